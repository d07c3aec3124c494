"""What the regret in log loss says about the regret in classification error, for any number of classes.

Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications", ICML 2023,
https://arxiv.org/abs/2302.02334.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torchfolio.checks import at_least, between

__all__ = ["consistency_bound", "least_log_regret"]

Array = NDArray[np.float64]


def least_log_regret(zero_one_regret: float | ArrayLike | Tensor) -> Any:
    """The least regret in log loss that a regret in zero-one loss costs.

    $$\\Gamma(t) = \\frac{1+t}{2}\\ln(1+t) + \\frac{1-t}{2}\\ln(1-t) \\ge \\frac{t^2}{2}$$

    For class probabilities p, a prediction q and $t = \\max_k p_k - p_{\\arg\\max q}$: $KL(p \\Vert q) \\ge \\Gamma(t)$,
    with equality at $p = (\\frac{1+t}2, \\frac{1-t}2)$, $q = (\\frac12, \\frac12)$.

    Args:
        zero_one_regret: t in [0, 1], a number, array or tensor.

    Returns:
        $\\Gamma(t)$ in [0, ln 2], in the form of the argument.

    Raises:
        ValueError: if a value is outside [0, 1] or NaN.

    Reference:
        Zheng et al., ICML 2023, explicit consistency bound of the logistic loss.
    """
    t = _array(zero_one_regret)
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"expected zero_one_regret in [0, 1], got {zero_one_regret!r}")
    return _like(_gamma(t), zero_one_regret)


def consistency_bound(
    log_regret: float | ArrayLike | Tensor, exact: bool = True, *, log_gap: float = 0.0, zero_one_gap: float = 0.0
) -> Any:
    """Bound of the regret in classification error by the regret in log loss.

    $$R_{01}(h) - R_{01}^* \\le \\Gamma^{-1}(R_{\\log}(h) - R_{\\log}^*) \\le \\sqrt{2 (R_{\\log}(h) - R_{\\log}^*)}$$

    with $\\Gamma$ of `least_log_regret`, its inverse, for any number of classes. For a hypothesis class that is not
    complete, regrets are against the best of the class, and its minimisability gaps are added on both sides:
    $\\Gamma^{-1}(\\text{log regret} + M_{\\log}) - M_{01}$.

    Args:
        log_regret: regret in log loss (nats) of at least 0, a number, array or tensor.
        exact: whether to take $\\Gamma^{-1}$; otherwise the square root, which is looser and simple.
        log_gap: minimisability gap $M_{\\log}$ of at least 0.
        zero_one_gap: minimisability gap $M_{01}$ in [0, 1].

    Returns:
        The bound in [0, 1], in the form of the argument. It says nothing (1) from a log regret of ln 2 on.

    Raises:
        ValueError: if a value is negative or NaN.

    Reference:
        Zheng et al., ICML 2023, multiclass $\\mathcal{H}$-consistency bounds, here for complete hypothesis classes.
    """
    at_least("log_gap", log_gap, 0)
    between("zero_one_gap", zero_one_gap, 0, 1)
    x = _array(log_regret) + log_gap
    if not (_array(log_regret) >= 0).all():
        raise ValueError(f"expected log_regret of at least 0, got {log_regret!r}")
    root = np.minimum(np.sqrt(2 * x), 1.0)
    bound = _gamma_inverse(x, root) if exact else root
    return _like(np.clip(bound - zero_one_gap, 0.0, 1.0), log_regret)


def _gamma(t: Array) -> Array:
    small = t < 0.02  # where the two terms cancel: the first five of the series are exact to the last digit
    square = t * t
    series = square * (1 / 2 + square * (1 / 12 + square * (1 / 30 + square * (1 / 56 + square / 90))))
    above, below = (1 + t) / 2, (1 - t) / 2
    direct = above * np.log1p(t) + below * np.log1p(-np.minimum(t, 1 - 1e-16))
    return np.where(small, series, direct)


def _gamma_inverse(x: Array, start: Array) -> Array:
    """Newton's method from above: $\\Gamma$ is convex, with the slope artanh t, so that no step passes the root."""
    t = np.minimum(start, 1 - 1e-16)
    for _ in range(60):
        slope = np.arctanh(t)
        t = np.clip(t - np.divide(_gamma(t) - x, slope, out=np.zeros_like(t), where=slope > 0), 0, 1 - 1e-16)
    return np.where(x >= np.log(2), 1.0, t)


def _array(values: Any) -> Array:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    return np.asarray(array, dtype=np.float64)


def _like(values: Array, given: Any) -> Any:
    if isinstance(given, Tensor):
        return torch.as_tensor(values, dtype=given.dtype if given.is_floating_point() else None, device=given.device)
    return float(values) if values.ndim == 0 else values
