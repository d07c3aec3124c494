"""Fitting: one training loop for every learning rule, checkpoints, blocks, ensembles."""

from torchfolio.engine.blocks import blocks, layers
from torchfolio.engine.ensemble import EnsembleResult, fit_many
from torchfolio.engine.evaluate import evaluate
from torchfolio.engine.fit import EarlyStopping, FitState, NonFiniteLoss, fit
from torchfolio.engine.history import FitResult, History
from torchfolio.engine.modes import evaluating, seeded
from torchfolio.engine.recorder import StepRecorder
from torchfolio.engine.rules import Backprop, Batch, LearningRule

__all__ = [
    "Backprop",
    "Batch",
    "EarlyStopping",
    "EnsembleResult",
    "FitResult",
    "FitState",
    "History",
    "LearningRule",
    "NonFiniteLoss",
    "StepRecorder",
    "blocks",
    "evaluate",
    "evaluating",
    "fit",
    "fit_many",
    "layers",
    "seeded",
]
