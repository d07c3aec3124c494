"""Self-consistency equations of the multitasking Hopfield network: which patterns are recalled, how strongly, and when.

Elena Agliari, Andrea Alessandrelli, Adriano Barra, Federico Ricci-Tersenghi, "Parallel Learning by Multitasking Neural
Networks", J. Stat. Mech. 2023, https://arxiv.org/abs/2308.04106.

For many spins and few patterns the overlaps $m_\\mu$ of a state with its patterns solve an equation in K unknowns, whose
expectation is a finite sum over the $3^K$ columns that sparse patterns can have:

    mean_field(K=3, d=0.3).best          # amplitudes 0.7, 0.21, 0.063: hierarchical
    mean_field(K=3, d=0.9, T=0.2).best   # three equal amplitudes: parallel
    mean_field(K=3, d=0.3, r=0.3, M=41)  # learned from 41 noisy examples of each pattern
    phase_diagram(3).plot()

Noise T is in units of the critical one throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchfolio.theory.hopfield_equations import Numbers, columns_of, one_each, self_consistency, solve, starting_points
from torchfolio.theory.hopfield_limits import (
    check_settings,
    critical_dilution,
    dataset_entropy,
    examples_needed,
    hierarchical_amplitudes,
    parallel_amplitude,
    single_pattern_learning,
)
from torchfolio.theory.hopfield_phases import PhaseDiagram, phase_diagram, regime

__all__ = [
    "FixedPoint",
    "MeanField",
    "PhaseDiagram",
    "critical_dilution",
    "dataset_entropy",
    "examples_needed",
    "hierarchical_amplitudes",
    "learning_curve",
    "mean_field",
    "parallel_amplitude",
    "phase_diagram",
    "regime",
    "self_consistency",
    "single_pattern_learning",
]


class FixedPoint(NamedTuple):
    """A solution of the self-consistency equations.

    Attributes:
        amplitudes: overlaps $m_\\mu$ with the patterns; in descending order where all patterns are alike.
        free_energy: free energy per spin; the solution with the lowest one is in equilibrium.
        regime: `"pure"`, `"hierarchical"`, `"bunched"`, `"parallel"` or `"ergodic"`; see `regime`.
    """

    amplitudes: tuple[float, ...]
    free_energy: float
    regime: str


@dataclass(frozen=True)
class MeanField:
    """All solutions that were reached, lowest free energy first.

    Attributes:
        points: solutions; saddle points and metastable states are among them.
        method: way in which the expectation was taken: `"enumeration"`, `"binomial"`, `"gaussian"` or `"sampling"`.
    """

    points: tuple[FixedPoint, ...]
    method: str

    @property
    def best(self) -> FixedPoint:
        """The solution in equilibrium."""
        return self.points[0]


# Closed forms


# The equations


def mean_field(
    K: int,
    d: float,
    T: float = 0.0,
    *,
    rho: Numbers = None,
    r: Numbers = None,
    M: Numbers = None,
    strengths: Numbers = None,
    n_starts: int = 24,
    seed: int = 0,
) -> MeanField:
    """Solve the self-consistency equations of K patterns, stored or learned, from many starts.

    With $\\hat\\eta = \\bar\\eta / r$, the mean of a pattern's examples over their quality,

    $$n_\\mu = \\frac{1}{1+\\rho_\\mu} E\\Bigl[\\hat\\eta^\\mu \\tanh \\frac{\\sum_\\nu n_\\nu \\hat\\eta^\\nu}{T(1-d)}\\Bigr],
    \\qquad m_\\mu = E\\Bigl[\\xi^\\mu \\tanh \\frac{\\sum_\\nu n_\\nu \\hat\\eta^\\nu}{T(1-d)}\\Bigr],$$

    with a teacher and without. Stored patterns are $\\rho = 0$.

    Args:
        K: number of patterns.
        d: dilution, the share of blanks, in [0, 1).
        T: noise in units of the critical one, at least 0.
        rho: entropy of the examples, one for all patterns or one for each; many examples are assumed.
        r: quality of the examples, in (0, 1], one for all patterns or one for each.
        M: number of examples, one for all or one for each; the sum is over binomials where it has at most a million
            terms, and over the normal limit where it has more.
        strengths: factor of each pattern in the couplings, 1 by default; without a teacher, unbalanced examples give
            each pattern its $R_\\mu M_\\mu$ over their mean.
        n_starts: random starts beside the hierarchical one and the equal mixtures.
        seed: seed of the random starts.

    Raises:
        ValueError: if an argument is out of range, or only one of `r` and `M` is given.

    Warns:
        UserWarning: if there are too many columns to enumerate, so that they are sampled.
    """
    check_settings(K, d, T)
    columns, method = columns_of(K, d, rho, r, M, seed)
    strength = one_each(1.0 if strengths is None else strengths, K, "strengths")
    if not bool((strength > 0).all()):
        raise ValueError(f"expected strengths above 0, got {strengths!r}")
    at = torch.tensor([d], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    m, energy, converged = solve(columns, starting_points(K, torch.tensor(d).double(), n_starts, seed), *at, strength)
    m = m.abs()
    if len({*columns.rho.tolist()}) == len({*strength.tolist()}) == 1:
        m = m.sort(-1, descending=True).values
    points: list[FixedPoint] = []
    for k in energy.argsort().tolist():
        new = all(np.abs(np.subtract(m[k].tolist(), p.amplitudes)).max() > 1e-4 for p in points)
        if bool(converged[k]) and new:
            points.append(FixedPoint(tuple(m[k].tolist()), float(energy[k]), regime(m[k], d)))
    if not points:
        raise RuntimeError(f"no start has converged at K = {K}, d = {d}, T = {T}; more starts may help")
    return MeanField(tuple(points), method)


def learning_curve(
    K: int,
    d: float,
    r: float | Sequence[float],
    M: Sequence[int | Sequence[int]],
    T: float = 0.0,
    start: int = 0,
) -> Tensor:
    """Overlaps with K patterns learned from growing numbers of examples, in recall that starts from one of them.

    Args:
        K: number of patterns.
        d: dilution.
        r: quality of the examples, one for all patterns or one for each.
        M: numbers of examples along the curve, each one for all patterns or one for each.
        T: noise.
        start: pattern that recall starts from.

    Returns:
        Overlaps, `[len(M), K]`.
    """
    check_settings(K, d, T)
    at = torch.tensor([d], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    first = torch.eye(K).double()[start : start + 1] * (1 - d)
    if len(first) != 1:
        raise ValueError(f"expected start to be a pattern from 0 to {K - 1}, got {start!r}")
    # The other patterns grow from a seed that breaks the symmetry between signs, as chance does in a network.
    first = first + 1e-3 * (1 - d) * d ** torch.arange(K).double()
    rows = [solve(columns_of(K, d, None, r, m, 0)[0], first, *at, torch.ones(1).double())[0][0] for m in M]
    return torch.stack(rows).abs()
