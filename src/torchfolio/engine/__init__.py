"""Fitting: one training loop for every learning rule, checkpoints, blocks, ensembles."""

from torchfolio.engine.blocks import blocks, layers
from torchfolio.engine.evaluate import evaluate
from torchfolio.engine.fit import EarlyStopping, FitState, NonFiniteLoss, fit
from torchfolio.engine.history import FitResult, History
from torchfolio.engine.modes import evaluating, seeded
from torchfolio.engine.rules import Backprop, Batch, LearningRule

__all__ = [
    "Backprop",
    "Batch",
    "EarlyStopping",
    "FitResult",
    "FitState",
    "History",
    "LearningRule",
    "NonFiniteLoss",
    "blocks",
    "evaluate",
    "evaluating",
    "fit",
    "layers",
    "seeded",
]
