"""Runs of experiments: arms, claims, seeds and the folder they are kept in. Readable without torch, for the report."""

from torchfolio.runs.environment import threads
from torchfolio.runs.job import SCALES, Job, experiment, plan
from torchfolio.runs.outcome import Outcome, Results
from torchfolio.runs.run import Run, column, pick
from torchfolio.runs.runner import run_all, run_experiment
from torchfolio.runs.settings import setting

__all__ = [
    "SCALES",
    "Job",
    "Outcome",
    "Results",
    "Run",
    "column",
    "experiment",
    "pick",
    "plan",
    "run_all",
    "run_experiment",
    "setting",
    "threads",
]
