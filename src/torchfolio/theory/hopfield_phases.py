"""Which patterns a multitasking Hopfield network recalls over a grid of dilution and noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from torchfolio.shown import Shown
from torchfolio.theory.hopfield_equations import Numbers, columns_of, solve, starting_points
from torchfolio.theory.hopfield_limits import check_settings, critical_dilution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["REGIMES", "PhaseDiagram", "phase_diagram", "regime"]


REGIMES = ("pure", "hierarchical", "bunched", "parallel", "ergodic")


def regime(amplitudes: Tensor | Sequence[float], d: float, N: float = math.inf) -> str:
    """Name of the way in which patterns are recalled, from the strengths of their recall.

    In this order: `"ergodic"` if none exceeds $4/\\sqrt N$; `"pure"` if the second is below 0.05 (1-d); `"parallel"` if
    the smallest is above 0.85 of the largest; `"hierarchical"` if each over the one before is within 0.1 of d, and d is
    not beyond the critical dilution; `"bunched"` otherwise. Where the names parallel and hierarchical both fit, which
    happens with two patterns, the nearer one.

    Args:
        amplitudes: overlaps with the patterns `[K]`, in any order; signs are ignored.
        d: dilution.
        N: number of spins; infinite by default.
    """
    m = torch.as_tensor(amplitudes, dtype=torch.float64).abs().sort(descending=True).values
    if m.dim() != 1 or not len(m) or not bool(m.isfinite().all()):
        raise ValueError(f"expected amplitudes [K] that are finite, got {amplitudes!r}")
    if float(m[0]) < max(4 / math.sqrt(N), 1e-4):
        return "ergodic"
    if len(m) == 1 or float(m[1]) < 0.05 * (1 - d):
        return "pure"
    ratios = m[1:] / m[:-1].clamp_min(1e-300)
    from_d, from_one = float((ratios - d).abs().max()), float((ratios - 1).abs().max())
    parallel, hierarchical = float(m[-1] / m[0]) > 0.85, from_d <= 0.1 and d <= critical_dilution(len(m))
    if parallel and not (hierarchical and from_d < from_one):
        return "parallel"
    return "hierarchical" if hierarchical else "bunched"


@dataclass(frozen=True, repr=False)
class PhaseDiagram(Shown):
    """Equilibrium over a grid of dilution and noise.

    Attributes:
        K: number of patterns.
        d: dilutions `[D]`.
        T: noises `[L]`.
        amplitudes: overlaps in descending order, `[D, L, K]`.
        regimes: their names, `[D][L]`.
    """

    K: int
    d: tuple[float, ...]
    T: tuple[float, ...]
    amplitudes: Tensor
    regimes: tuple[tuple[str, ...], ...]

    def plot(self) -> Figure:
        """The regimes by colour, and the ratio of the smallest overlap to the largest."""
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
        colours = ["#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#dddddd"]
        codes = np.array([[REGIMES.index(name) for name in row] for row in self.regimes]).T
        left.pcolormesh(self.d, self.T, codes, cmap=ListedColormap(colours), vmin=-0.5, vmax=4.5, shading="nearest")
        left.legend(
            handles=[Patch(color=c, label=n) for c, n in zip(colours, REGIMES, strict=True)],
            fontsize=8,
            framealpha=1,
            loc="upper left",
        )
        largest = self.amplitudes[..., 0].clamp_min(1e-9)
        ratio = np.where(largest > 1e-4, self.amplitudes[..., -1] / largest, np.nan).T
        mesh = right.pcolormesh(self.d, self.T, ratio, vmin=0, vmax=1, shading="nearest")
        fig.colorbar(mesh, label="$m_K / m_1$")
        left.set(xlabel="dilution d", ylabel="noise $T / T_c$", title=f"regimes, K = {self.K}")
        right.set(xlabel="dilution d", title="smallest over largest overlap")
        return fig


def phase_diagram(
    K: int,
    d: Sequence[float] | None = None,
    T: Sequence[float] | None = None,
    *,
    rho: Numbers = None,
    n_starts: int = 24,
    seed: int = 0,
) -> PhaseDiagram:
    """Equilibrium on a grid, solved at once.

    Args:
        K: number of patterns, at most 12.
        d: dilutions; 12 from 0.05 to 0.95 by default.
        T: noises; 12 from 0.02 to 1.12 by default.
        rho: entropy of the examples; 0, stored patterns, by default.
        n_starts: random starts at each point.
        seed: seed of the random starts.

    Warns:
        ConvergenceWarning: if at some point no start has converged.
    """
    dilutions = tuple(np.linspace(0.05, 0.95, 12).tolist() if d is None else d)
    noises = tuple(np.linspace(0.02, 1.12, 12).tolist() if T is None else T)
    for dilution in dilutions:
        for noise in noises:
            check_settings(K, dilution, noise)
    columns, _ = columns_of(K, None, rho, None, None, seed)
    grid_d = torch.tensor(dilutions).double()[:, None].expand(-1, len(noises))
    grid_T = torch.tensor(noises).double()[:, None, None]
    starts = starting_points(K, grid_d, n_starts, seed)
    m, energy, converged = solve(columns, starts, grid_d[..., None, None], grid_T, torch.ones(1).double(), steps=600)
    settled = converged.any(-1)
    if not bool(settled.all()):
        i, j = (~settled).nonzero()[0].tolist()
        warnings.warn(
            f"no start has converged at {int((~settled).sum())} of {settled.numel()} points, first at d = {dilutions[i]:g}, "
            f"T = {noises[j]:g}: what is shown there is where the lowest had got to",
            ConvergenceWarning,
            stacklevel=2,
        )
    best = torch.where(converged | ~settled[..., None], energy, math.inf).argmin(-1)
    m = m.abs().sort(-1, descending=True).values
    m = m.gather(-2, best[..., None, None].expand(*best.shape, 1, K))[..., 0, :]
    names = tuple(tuple(regime(row, dilution) for row in line) for line, dilution in zip(m, dilutions, strict=True))
    return PhaseDiagram(K, dilutions, noises, m, names)
