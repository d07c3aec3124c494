"""Multitasking Hopfield networks without thermal noise, in closed form: amplitudes, dilutions, and examples to learn from."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import binom
from torch import Tensor

from torchfolio import checks

__all__ = [
    "critical_dilution",
    "dataset_entropy",
    "examples_needed",
    "hierarchical_amplitudes",
    "parallel_amplitude",
    "single_pattern_learning",
]


def critical_dilution(K: float) -> float:
    """Dilution up to which K patterns are recalled hierarchically without noise: the root of $\\sum_{j=1}^{K-1} d^j = 1$.

    Up to it the first pattern outweighs all the others together on the spins it owns. 1 for K up to 2, the golden ratio
    0.618 for K = 3, falling to 1/2.

    Args:
        K: number of patterns, at least 1; `math.inf` for the limit.
    """
    if not K >= 1 or (math.isfinite(K) and int(K) != K):
        raise ValueError(f"expected K to be a whole number of at least 1, or infinity, got {K!r}")
    if K <= 2:
        return 1.0
    if K > 60:  # the rest of the series is below double precision
        return 0.5
    powers = np.arange(1, int(K))
    return float(brentq(lambda d: np.sum(d**powers) - 1, 0.4, 1.0, xtol=1e-14))  # pyright: ignore[reportArgumentType]


def hierarchical_amplitudes(K: int, d: float) -> Tensor:
    """Overlaps of the hierarchical state, in which spins that are blank in one pattern serve the next:
    $m_\\mu = (1-d)\\,d^{\\mu-1}$, `[K]`."""
    check_settings(K, d, 0.0)
    return (1 - d) * d ** torch.arange(K, dtype=torch.float64)


def parallel_amplitude(K: int, d: float) -> float:
    """Overlap of the parallel state, $\\sigma_i = \\operatorname{sign} \\sum_\\mu \\xi_i^\\mu$, with each pattern:
    $(1-d)\\,[P(S > -1) - P(S < -1)]$ for the sum S of K - 1 diluted signs."""
    check_settings(K, d, 0.0)
    sign, total = np.array([(1 - d) / 2, d, (1 - d) / 2]), np.ones(1)
    for _ in range(K - 1):
        total = np.convolve(total, sign)  # the distribution of S on -(K-1)..K-1
    sums = np.arange(-(K - 1), K)
    return float((1 - d) * (total[sums > -1].sum() - total[sums < -1].sum()))


def dataset_entropy(r: float, M: float) -> float:
    """Entropy of M examples of quality r, $\\rho = (1-r^2)/(M r^2)$: what learning depends on."""
    check_examples(r, M)
    return (1 - r**2) / (M * r**2)


def examples_needed(r: float) -> float:
    """Examples at which the signal of a pattern exceeds one standard deviation of its noise ($\\rho \\le 1$):
    $M = (1-r^2)/r^2$."""
    check_examples(r, 1)
    return (1 - r**2) / r**2


def single_pattern_learning(r: float, M: int, d: float = 0.0, exact: bool = True) -> float:
    """Overlap with a single pattern that was learned from M examples and is recalled without noise.

    Args:
        r: quality of the examples, in (0, 1].
        M: number of examples; a tie of an even number counts nothing.
        d: dilution, in [0, 1).
        exact: binomial probability of the majority's being right; otherwise its limit for many examples,
            $(1-d) \\operatorname{erf}(1/\\sqrt{2\\rho})$.
    """
    check_settings(1, d, 0.0)
    rho = dataset_entropy(r, M)
    if not exact:
        return (1 - d) * (math.erf(1 / math.sqrt(2 * rho)) if rho else 1.0)
    p = (1 + r) / 2
    return float((1 - d) * (binom.sf(M // 2, M, p) - binom.cdf((M - 1) // 2, M, p)))


def check_settings(K: int, d: float, T: float) -> None:
    checks.whole("K", K, low=1)
    checks.between("dilution d", d, 0, 1, inclusive=(True, False))
    checks.between("noise T", T, 0, math.inf, inclusive=(True, False))


def check_examples(r: float, M: float) -> None:
    checks.between("quality r", r, 0, 1, inclusive=(False, True))
    if not M >= 1 or int(M) != M:
        raise ValueError(f"expected M to be a whole number of at least 1, got {M!r}")
