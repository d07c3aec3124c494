"""Pairs of classes whose triggers work for each other: the set that stands out, and how small its triggers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from torchfolio import checks

__all__ = ["Core", "core_periphery", "objective", "order_statistic_score", "p_value"]


@dataclass(frozen=True)
class Core:
    """A set of pairs of classes that work for each other.

    Attributes:
        members: their places, in the order in which they were added.
        H: objective.
    """

    members: tuple[int, ...]
    H: float


def core_periphery(A: np.ndarray | Tensor, sources: Sequence[int], n_init: int = 5) -> Core:
    """The set of pairs with different sources that maximises $H$, grown greedily.

    It begins with each of the `n_init` best-connected two pairs, adds the pair that gives the largest $H$ even if that
    falls, until every source is taken, and keeps the best set on the way.

    Args:
        A: transfers `[P, P]` with values in [0, 1].
        sources: source class of each pair `[P]`.
        n_init: number of beginnings.

    Raises:
        ValueError: if A is not square, holds NaN or fits no sources, or no two pairs have different sources.

    Reference:
        Xiang et al., "UMD: Unsupervised Model Detection for X2X Backdoor Attacks", ICML 2023, Section 4.2.
    """
    a = checks.finite("A", np.asarray(A, dtype=np.float64))
    s = np.asarray(sources)
    if a.ndim != 2 or a.shape != (len(s), len(s)):
        raise ValueError(f"expected transfers [P, P] of {len(s)} pairs, got shape {a.shape}")
    mutual = (a + a.T) / 2
    first, second = np.triu_indices(len(s), 1)
    allowed = s[first] != s[second]
    first, second = first[allowed], second[allowed]
    if not len(first):
        raise ValueError("expected pairs with at least two different sources: a backdoor of one pair cannot be seen")
    starts = np.argsort(-mutual[first, second], kind="stable")[: checks.whole("n_init", n_init, 1)]
    return max((_grown(a, mutual, s, [int(first[k]), int(second[k])]) for k in starts), key=lambda core: core.H)


def _grown(a: np.ndarray, mutual: np.ndarray, s: np.ndarray, members: list[int]) -> Core:
    """The best set on the greedy path from two pairs."""
    best = Core(tuple(members), objective(a, members))
    while True:
        candidates = np.flatnonzero(~np.isin(s, s[members]))
        if not len(candidates):
            return best
        size = len(members) + 1
        inner, outer = mutual[members][:, members].sum(1), a[members].sum(0)
        inside = np.minimum(
            (inner[:, None] + mutual[members][:, candidates]).min(0), mutual[candidates][:, members].sum(1)
        )
        reach = outer + a[candidates]
        reach[:, members] = -np.inf
        reach[np.arange(len(candidates)), candidates] = -np.inf
        reached = reach.max(1)
        outside = np.where(np.isfinite(reached), reached / size, 0.0)
        values = inside / (size - 1) - outside
        k = int(values.argmax())
        members = [*members, int(candidates[k])]
        if values[k] > best.H:
            best = Core(tuple(members), float(values[k]))


def objective(A: np.ndarray, members: Sequence[int]) -> float:
    """$H$ of a set of pairs."""
    k = list(members)
    inside = ((A[k][:, k] + A[k][:, k].T) / 2).sum(1).min() / (len(k) - 1)
    others = np.setdiff1d(np.arange(len(A)), k)
    return float(inside - (A[k][:, others].mean(0).max() if len(others) else 0.0))


def order_statistic_score(r: np.ndarray | Tensor, core: Sequence[int], confidence: float = 0.95) -> tuple[float, float]:
    """The score $z$ of a set of pairs, and the threshold $\\theta$.

    $\\theta$ is what the largest of N independent standard normals stays below with probability `confidence`.

    Args:
        r: $1 / \\text{size}$ of every pair `[P]`, 0 where there is no trigger.
        core: places of the set.
        confidence: $\\beta$, share of clean networks that are not called suspicious.

    Returns:
        $z$ and $\\theta$; where the null has no spread z is infinite if $\\bar r > \\mu$, else 0.

    Raises:
        ValueError: if the set is empty or is all there is.
    """
    from scipy.stats import norm

    values = checks.finite("r", np.asarray(r, dtype=np.float64))
    checks.between("confidence", confidence, 0, 1, inclusive=False)
    inside = np.isin(np.arange(len(values)), list(core))
    if not inside.any() or inside.all():
        raise ValueError(f"expected a set of some of {len(values)} pairs, got {int(inside.sum())}")
    null = values[~inside]
    centre = float(np.median(null))
    spread = 1.4826 * float(np.median(np.abs(null - centre)))
    gap = float(np.median(values[inside])) - centre
    z = gap / spread if spread > 0 else (math.inf if gap > 0 else 0.0)
    return z, float(norm.ppf(confidence ** (1 / len(null))))


def p_value(z: float, count: int) -> float:
    """How rarely the largest of so many standard normals exceeds z."""
    from scipy.stats import norm

    return -math.expm1(count * float(norm.logcdf(z)))
