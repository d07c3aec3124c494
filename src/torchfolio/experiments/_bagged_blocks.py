"""The control of boosting: blocks that do not see what those before them left."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import RandomState

from torchfolio.efficiency.gbnn import Array, GBNNClassifier, MulticlassLoss

__all__ = ["Bagged"]


class Bagged(GBNNClassifier):
    """Every block is fitted to the residuals of the constant start, and only the steps see the sum."""

    def _grow(self, Z: Array, Y: Array, loss: Any, rng: RandomState, held: Any) -> Any:
        return super()._grow(Z, Y, _Frozen(loss.start(Y)), rng, held)


class _Frozen(MulticlassLoss):
    def __init__(self, start: Array) -> None:
        self.constant = start

    def residual(self, y: Array, F: Array) -> Array:
        return super().residual(y, np.broadcast_to(self.constant, F.shape))
