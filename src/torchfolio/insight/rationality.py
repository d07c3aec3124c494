"""How rational a chooser is, fitted by what its decisions are worth, or by likelihood.

Reference:
    Huang and Yuan, arXiv 2305.14859; the fit by decisions is our reading. Temperature scaling: Guo et al., On Calibration of
    Modern Neural Networks, ICML 2017.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchfolio.checks import between, finite, labels, positive

__all__ = ["GRID", "RationalityFit", "choices", "fit_rationality", "fit_temperature"]

GRID = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.7, 8.0)
"""Rationalities that `fit_rationality` tries."""


@dataclass(frozen=True)
class RationalityFit:
    """A rationality fitted by decisions.

    Attributes:
        kappa: smallest rationality at which the metric reached the target; the best one tried where none did.
        curve: `(kappa, metric)` in the order tried.
        target: $(1 - \\varepsilon)$ of the reference.
        reached: whether the target was reached.
        bisected: whether the grid was refined; it is not where the metric falls on the way up.
    """

    kappa: float
    curve: tuple[tuple[float, float], ...]
    target: float
    reached: bool
    bisected: bool


def fit_rationality(
    metric: Callable[[float], float],
    *,
    reference: float,
    grid: Sequence[float] = GRID,
    tolerance: float = 0.01,
    bisections: int = 4,
) -> RationalityFit:
    """The smallest rationality at which a rule that uses probabilities does nearly as well as one that uses the order.

    Smallest, because variety falls with rationality. Fit on other inputs than those that are reported on.

    Args:
        metric: task metric of the rule at a rationality, higher is better; with the same random numbers each time.
        reference: metric of the rule by order, such as greedy decoding.
        grid: rationalities, rising.
        tolerance: $\\varepsilon$: the target is $(1 - \\varepsilon)$ times the reference.
        bisections: number of bisections in $\\log \\kappa$, between the last that fails and the first that passes.

    Raises:
        ValueError: if the grid is empty, does not rise or is not positive.

    Warns:
        UserWarning: if no rationality reaches the target, or the metric falls on the way up.
    """
    values = [positive("grid", kappa) for kappa in grid]
    if not values or any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"expected a grid that rises, got {list(grid)}")
    target = (1 - between("tolerance", tolerance, 0, 1)) * finite("reference", reference)
    curve: list[tuple[float, float]] = []
    for kappa in values:
        curve.append((kappa, float(finite("metric", metric(kappa)))))
        if curve[-1][1] >= target:
            break
    if curve[-1][1] < target:
        kappa, best = max(curve, key=lambda pair: pair[1])
        warnings.warn(f"no rationality reaches {target:.4g}; the best is {best:.4g} at {kappa:.4g}", stacklevel=2)
        return RationalityFit(kappa, tuple(curve), target, False, False)
    heights = [value for _, value in curve]
    falls = max((max(heights[: k + 1]) - h for k, h in enumerate(heights)), default=0.0)
    if falls > tolerance * abs(reference):
        warnings.warn(f"the metric falls by {falls:.3g} on the way up: the grid is not refined", stacklevel=2)
        return RationalityFit(curve[-1][0], tuple(curve), target, True, False)
    passing = curve[-1][0]
    if len(curve) > 1:
        failing = curve[-2][0]
        for _ in range(bisections):
            middle = math.sqrt(failing * passing)
            curve.append((middle, float(finite("metric", metric(middle)))))
            failing, passing = (failing, middle) if curve[-1][1] >= target else (middle, passing)
    return RationalityFit(passing, tuple(curve), target, True, len(curve) > 1)


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The rationality of the highest likelihood on held-out data: one over the temperature of temperature scaling.

    Args:
        logits: `[N, C]`.
        y: labels `[N]`; -100 counts nowhere.

    Returns:
        $\\kappa$ between $10^{-3}$ and $10^3$; the likelihood is concave in it, the zero of its slope is bisected.
    """
    logits, y = torch.as_tensor(logits), torch.as_tensor(y)
    counted = y != -100
    logits, y = finite("logits", logits[counted]).double(), y[counted]
    choices(logits, y)
    revealed = logits.gather(1, y[:, None])[:, 0].mean()

    def slope(kappa: float) -> float:
        return float(revealed - ((kappa * logits).softmax(1) * logits).sum(1).mean())

    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def choices(logits: Tensor, y: Tensor) -> None:
    """Refuse utilities that are not `[N, C]`, and choices that are not one of C for each row."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"expected utilities [N, C] of at least two alternatives, got shape {tuple(logits.shape)}")
    if bool(logits.isnan().any()):
        raise ValueError(f"expected utilities, got NaN in {int(logits.isnan().sum())} of {logits.numel()}")
    if len(y) != len(logits):
        raise ValueError(f"expected as many choices as rows of utilities, got {len(y)} and {len(logits)}")
    labels(y, logits.shape[1])
