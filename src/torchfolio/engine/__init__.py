"""Fitting: one training loop for every learning rule, checkpoints, blocks, ensembles."""

from torchfolio.engine.blocks import blocks, layers
from torchfolio.engine.rules import Backprop, Batch, LearningRule

__all__ = ["Backprop", "Batch", "LearningRule", "blocks", "layers"]
