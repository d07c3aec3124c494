"""Running experiments: seeds, processes, resuming, outcomes."""

from __future__ import annotations

import importlib
import json
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from torchfolio.runs.environment import environment
from torchfolio.runs.job import SCALES as SCALES
from torchfolio.runs.job import Job, Say, claims_of, command, plan
from torchfolio.runs.job import experiment as experiment
from torchfolio.runs.measuring import Measured, draw_off_screen, measure_seed
from torchfolio.runs.outcome import Outcome, Results, aggregate_arms, aggregate_claims
from torchfolio.runs.run import save_figure
from torchfolio.runs.settings import override
from torchfolio.runs.store import clear_scratch, write_json
from torchfolio.runs.workers import measure_in_processes, measure_on_ray

MeasuredSeeds = dict[tuple[Path, int], Measured]
"""What was measured in other processes, by the folder of the run and the seed; those that failed are not in it."""


def run_experiment(
    slug: str | ModuleType,
    scale: str = "quick",
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    *,
    device: str = "auto",
    out: str | Path = "runs",
    resume: bool = False,
    jobs: int = 1,
    say: Say = lambda text: None,
) -> Outcome:
    """Measure the claims of one paper.

    Args:
        slug: slug of the paper, or an experiment's module.
        scale: `"smoke"` (seconds, toy data), `"quick"` (minutes) or `"full"`.
        seeds: one run each; claims are decided on the means over them.
        settings: changes to the experiment's settings.
        device: device to compute on.
        out: folder of run folders.
        resume: whether to go on with the latest unfinished run of the same slug, scale, seeds and settings.
        jobs: seeds at a time, each in a process.
        say: function that is called with lines about what is going on.

    Returns:
        The outcome; a failure of the experiment is in it, not raised.

    Raises:
        TorchfolioError: if there is no such experiment or scale.
        ValueError: on settings that it does not have, or if another process is at the run to be resumed.
    """
    return run_all([plan(slug, scale, seeds, settings, device=device, out=out, resume=resume)], jobs=jobs, say=say)[0]


def run_all(
    jobs_to_run: Sequence[Job], *, jobs: int = 1, ray: bool = False, say: Say = lambda text: None
) -> list[Outcome]:
    """Run experiments; a failing one does not stop the others.

    Args:
        jobs_to_run: jobs, see `plan`.
        jobs: seeds at a time, each in a process of its own with its share of the threads.
        ray: spread the seeds over a Ray cluster (the local machine if there is none).
        say: function that is called with lines about what is going on.

    Raises:
        FolderInUse: if another process is at one of them.
    """
    from torchfolio.engine.lock import exclusive

    if jobs < 1:
        raise ValueError(f"expected at least one job, got {jobs}")
    draw_off_screen()
    measured: MeasuredSeeds = {}
    outcomes: dict[Path, Outcome] = {}

    def take(job: Job, seed: int, result: Measured | str | BaseException) -> None:
        say(f"{job.slug} seed {seed}: {'done' if isinstance(result, Measured) else f'failed: {result}'}")
        if isinstance(result, Measured):
            measured[job.folder, seed] = result
            if all((job.folder, other) in measured for other in job.seeds):
                outcomes[job.folder] = _conclude(job, measured, say)

    with ExitStack() as stack:
        for job in jobs_to_run:
            stack.enter_context(exclusive(job.folder))
            clear_scratch(job.folder)
        if ray:
            measure_on_ray(jobs_to_run, take)
        elif jobs > 1:
            measure_in_processes(jobs_to_run, jobs, take)
        return [outcomes.get(job.folder) or _conclude(job, measured, say) for job in jobs_to_run]


def _conclude(job: Job, measured: MeasuredSeeds, say: Say) -> Outcome:
    """Run what is left of the seeds, put the outcome together and write it."""
    from torchfolio.engine.devices import resolve_device

    module = importlib.import_module(job.module)
    settings = override(module.SCALES[job.scale], job.settings)
    outcome = Outcome(
        slug=job.slug,
        scale=job.scale,
        status="interrupted",
        seeds=list(job.seeds),
        settings=json.loads(json.dumps(asdict(settings))),
        command=command(job),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        environment=environment(str(resolve_device(job.device))),
    )
    write_json(job.folder / "environment.json", outcome.environment)
    runs: list[Measured] = []
    arms: list[dict[str, dict[str, Any]]] = []
    try:
        for seed in job.seeds:
            runs.append(measured.get((job.folder, seed)) or measure_seed(job, seed, say))
            arms.append(runs[-1].arms(job))
        outcome.figures = _figures(module, Results(settings, job.seeds, tuple(arms)), job, runs)
        outcome.status = "done"
    except Exception as error:
        outcome.status = "failed"
        outcome.error = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        say(f"{job.slug}: failed: {type(error).__name__}: {error}")
    finally:
        done = outcome.status == "done"
        claims = claims_of(job.slug, module)
        outcome.claims = aggregate_claims(claims, [run.values for run in runs if done], judge=job.scale != "smoke")
        outcome.arms = aggregate_arms(arms if done else [])
        outcome.seconds = round(sum(sum(run.seconds.values()) for run in runs), 2)
        outcome.save(job.folder)
    return outcome


def _figures(module: ModuleType, results: Results, job: Job, runs: Sequence[Measured]) -> list[dict[str, str]]:
    """Pictures over all seeds, then those of single seeds."""
    figures = []
    if hasattr(module, "figures"):
        for name, figure in module.figures(results).items():
            save_figure(job.folder / "figures", name, figure)
            figures.append(_files(name, "", "figures"))
    for run in runs:
        for name, caption in run.figures.items():
            label = f"{name} (seed {run.seed})" if len(runs) > 1 else name
            figures.append(_files(name, caption, f"seed-{run.seed}/figures") | {"name": label})
    return figures


def _files(name: str, caption: str, folder: str) -> dict[str, str]:
    stem = name.replace(" ", "_").replace("/", "_")
    return {"name": name, "caption": caption, "svg": f"{folder}/{stem}.svg", "png": f"{folder}/{stem}.png"}
