"""What gradient boosting needs of a loss: the best constant, residuals, and the length of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax

from torchfolio.shown import Shown

__all__ = ["BinaryLoss", "Loss", "MulticlassLoss", "SquaredLoss"]

Array = NDArray[np.float64]


class Loss(Shown, ABC):
    """What boosting needs of a loss; $y$ and $F$ are `[N, K]`.

    Attributes:
        factor: the logits of the assembled network are $F$ times this.
        blank: whether the output weights of a block start at 0. Whatever the names or the order of the classes, they are
            then learned alike: with two classes swapped, $F$ is exactly $-F$.
    """

    factor = 1.0
    blank = True

    def frame(self, y: Array, start: Array) -> tuple[Array, Array]:
        """Zero and unit `[K]` of the coordinates that targets are boosted in; 0 and 1 where they have none of their own."""
        return np.zeros(y.shape[1]), np.ones(y.shape[1])

    @abstractmethod
    def start(self, y: Array) -> Array:
        """The constant $F_0$ `[K]` that minimises the mean loss."""

    @abstractmethod
    def value(self, y: Array, F: Array) -> float:
        """Mean loss."""

    @abstractmethod
    def residual(self, y: Array, F: Array) -> Array:
        """Minus the derivative of each example's loss, `[N, K]`."""

    @abstractmethod
    def step(self, y: Array, F: Array, f: Array) -> float | None:
        """Length $\\rho$ of the step from $F$ along $f$; `None` where the loss has no curvature left."""


class SquaredLoss(Loss):
    """$\\frac12 \\lVert y - F\\rVert^2$; the block was fitted by least squares already, so $\\rho = 1$.

    Its unit is the standard deviation of the targets and its zero $F_0$, so that neither the ridge nor the start of a block
    depends on whether they are metres or miles.
    """

    blank = False

    def frame(self, y: Array, start: Array) -> tuple[Array, Array]:
        largest = np.abs(y).max(0)
        spread = largest * (y / np.where(largest > 0, largest, 1.0)).std(0)  # squares of targets might leave the range
        return start, np.where(spread > 1e-12 * largest, spread, 1.0)

    def start(self, y: Array) -> Array:
        return y.mean(0)

    def value(self, y: Array, F: Array) -> float:
        return 0.5 * float(np.square(y - F).sum(1).mean())

    def residual(self, y: Array, F: Array) -> Array:
        return y - F

    def step(self, y: Array, F: Array, f: Array) -> float:
        return 1.0


class BinaryLoss(Loss):
    """$\\log(1 + e^{-2yF})$ for $y = \\pm 1$, so that $P(y = 1) = \\operatorname{sigmoid}(2F)$."""

    factor = 2.0

    def start(self, y: Array) -> Array:
        return np.arctanh(y.mean(0))  # half the log odds, to the last bit an odd function

    def value(self, y: Array, F: Array) -> float:
        return float(np.logaddexp(0, -2 * y * F).mean())

    def residual(self, y: Array, F: Array) -> Array:
        return 2 * y * expit(-2 * y * F)

    def step(self, y: Array, F: Array, f: Array) -> float | None:
        r = BinaryLoss.residual(self, y, F)
        return _newton(np.sum(r * f), np.sum(r * f**2 * (2 * y - r)))


class MulticlassLoss(Loss):
    """$-\\sum_k y_k \\log\\operatorname{softmax}_k(F)$ for one-hot $y$; one step length for all classes."""

    def start(self, y: Array) -> Array:
        prior = np.log(y.mean(0))
        return prior - prior.mean()

    def value(self, y: Array, F: Array) -> float:
        return -float((y * log_softmax(F, axis=1)).sum(1).mean())

    def residual(self, y: Array, F: Array) -> Array:
        return y - softmax(F, axis=1)

    def step(self, y: Array, F: Array, f: Array) -> float | None:
        p = softmax(F, axis=1)
        return _newton(np.sum(f * (y - p)), np.sum(f**2 * p * (1 - p)))


def _newton(slope: float, curvature: float) -> float | None:
    return None if abs(curvature) < 1e-12 else float(slope / curvature)
