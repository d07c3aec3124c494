"""Fitting: one training loop for every learning rule, checkpoints, blocks, ensembles."""

from torchfolio.engine.blocks import blocks, layers
from torchfolio.engine.ensemble import EnsembleResult, fit_many
from torchfolio.engine.evaluate import evaluate
from torchfolio.engine.fit import fit
from torchfolio.engine.history import FitResult, History
from torchfolio.engine.modes import evaluating, seeded
from torchfolio.engine.objectives import Added, Objective
from torchfolio.engine.recorder import StepRecorder
from torchfolio.engine.rules import Backprop, Batch, LearningRule, default_loss
from torchfolio.engine.scalars import NonFiniteLoss
from torchfolio.engine.setup import make_fabric
from torchfolio.engine.state import EarlyStopping, FitState

__all__ = [
    "Added",
    "Backprop",
    "Batch",
    "EarlyStopping",
    "EnsembleResult",
    "FitResult",
    "FitState",
    "History",
    "LearningRule",
    "NonFiniteLoss",
    "Objective",
    "StepRecorder",
    "blocks",
    "default_loss",
    "evaluate",
    "evaluating",
    "fit",
    "fit_many",
    "layers",
    "make_fabric",
    "seeded",
]
