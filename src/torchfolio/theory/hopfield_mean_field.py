"""Self-consistency equations of the multitasking Hopfield network: which patterns are recalled, how strongly, and when.

Elena Agliari, Andrea Alessandrelli, Adriano Barra, Federico Ricci-Tersenghi, "Parallel Learning by Multitasking Neural
Networks", J. Stat. Mech. 2023, https://arxiv.org/abs/2308.04106.

For many spins and few patterns the overlaps $m_\\mu$ of a state with its patterns solve an equation in K unknowns, whose
expectation is a finite sum over the $3^K$ columns that sparse patterns can have:

    mean_field(K=3, d=0.3).best          # amplitudes 0.7, 0.21, 0.063: hierarchical
    mean_field(K=3, d=0.9, T=0.2).best   # three equal amplitudes: parallel
    mean_field(K=3, d=0.3, r=0.3, M=41)  # learned from 41 noisy examples of each pattern
    phase_diagram(3).plot()

Noise T is in units of the critical one throughout. The file is longer than others because the expectation is taken in
four ways: enumerated, over binomials, over normal noise, and sampled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import binom
from torch import Tensor

from torchfolio import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

ENUMERATED = 1_000_000  # most columns that are summed over exactly
SAMPLED = 200_000  # columns drawn where there are more
REGIMES = ("pure", "hierarchical", "bunched", "parallel", "ergodic")
Numbers = float | Sequence[float] | None


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
        points: the solutions; saddle points and metastable states are among them.
        method: how the expectation was taken: `"enumeration"`, `"binomial"`, `"gaussian"` or `"sampling"`.
    """

    points: tuple[FixedPoint, ...]
    method: str

    @property
    def best(self) -> FixedPoint:
        """The solution in equilibrium."""
        return self.points[0]


# Closed forms


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
    _check(K, d, 0.0)
    return (1 - d) * d ** torch.arange(K, dtype=torch.float64)


def parallel_amplitude(K: int, d: float) -> float:
    """Overlap of the parallel state, $\\sigma_i = \\operatorname{sign} \\sum_\\mu \\xi_i^\\mu$, with each pattern:
    $(1-d)\\,[P(S > -1) - P(S < -1)]$ for the sum S of K - 1 diluted signs."""
    _check(K, d, 0.0)
    sign, total = np.array([(1 - d) / 2, d, (1 - d) / 2]), np.ones(1)
    for _ in range(K - 1):
        total = np.convolve(total, sign)  # the distribution of S on -(K-1)..K-1
    sums = np.arange(-(K - 1), K)
    return float((1 - d) * (total[sums > -1].sum() - total[sums < -1].sum()))


def dataset_entropy(r: float, M: float) -> float:
    """Entropy of M examples of quality r, $\\rho = (1-r^2)/(M r^2)$: what learning depends on."""
    _check_examples(r, M)
    return (1 - r**2) / (M * r**2)


def examples_needed(r: float) -> float:
    """Examples at which the signal of a pattern exceeds one standard deviation of its noise ($\\rho \\le 1$):
    $M = (1-r^2)/r^2$."""
    _check_examples(r, 1)
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
    _check(1, d, 0.0)
    rho = dataset_entropy(r, M)
    if not exact:
        return (1 - d) * (math.erf(1 / math.sqrt(2 * rho)) if rho else 1.0)
    p = (1 + r) / 2
    return float((1 - d) * (binom.sf(M // 2, M, p) - binom.cdf((M - 1) // 2, M, p)))


# The equations


class _Columns:
    """Columns of K patterns as a site sees them, with their probabilities, after `V` came in place of the patterns.

    Args:
        V: values $\\hat\\eta$ at a site, `[P, K]`: 0 where blank, otherwise around a sign.
        X: expected sign of the pattern itself, `[P, K]`.
        q: probability of the column given which entries are blank, `[P]`; `None` where columns were drawn from d.
        rho: entropy of the examples of each pattern, `[K]`.
        gaussian: whether `V` holds the signs, around which the values are normal of variance `rho`.
        present: which entries are not blank, `[P, K]`; those of `V` that are not 0 by default.
    """

    def __init__(
        self, V: Tensor, X: Tensor, q: Tensor | None, rho: Tensor, gaussian: bool = False, present: Tensor | None = None
    ) -> None:
        present = V.ne(0) if present is None else present
        if q is not None:
            # Turning all signs changes nothing, so that one of each two columns is enough.
            first = V.gather(-1, V.ne(0).long().argmax(-1, keepdim=True))[:, 0]
            half = first >= 0
            V, X, present, q = V[half], X[half], present[half], (q * torch.where(first > 0, 2.0, 1.0))[half]
        self.V, self.X, self.q, self.rho, self.gaussian = V, X, q, rho, gaussian
        self.present = present.sum(-1)

    def probabilities(self, d: Tensor) -> Tensor:
        if self.q is None:
            return torch.full((len(self.V),), 1 / len(self.V), dtype=torch.float64)
        return self.q * (1 - d) ** self.present * d ** (self.V.shape[1] - self.present)

    def __call__(self, n: Tensor, d: Tensor, T: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the equations from order parameters n `[..., K]`: the next n, overlaps, and the free energy of n.

        `d` and `T` are `[..., 1]`.
        """
        w, weighted = self.probabilities(d), strength * n
        local = weighted @ self.V.T / (1 - d)
        spread = (weighted.square() * self.rho) @ self.V.square().T if self.gaussian else None
        spin, slope, energy = _thermal(local, T, None if spread is None else spread.sqrt() / (1 - d))
        moments = (w * spin) @ self.V
        if slope is not None:
            moments = moments + self.rho * weighted * ((w * slope) @ self.V.square()) / (1 - d)
        cost = (strength * (1 + self.rho) * n.square()).sum(-1) / (2 * (1 - d[..., 0]))
        return moments / (1 + self.rho), (w * spin) @ self.X, cost - (w * energy).sum(-1)


def _thermal(h: Tensor, T: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mean spin in the field h, its mean slope in h, and $T \\ln 2\\cosh(h/T)$, averaged over a normal spread of the field."""
    cold = T == 0
    noise = torch.where(cold, 1.0, T)
    if spread is None:
        # Rounding must not decide a tie, which counts nothing.
        h = torch.where(h.abs() < 1e-12, 0.0, h)
        spin = torch.where(cold, h.sign(), torch.tanh(h / noise))
        return spin, None, h.abs() + torch.where(cold, 0.0, noise * torch.log1p(torch.exp(-2 * h.abs() / noise)))
    b = spread.clamp_min(1e-150)
    if bool(cold.all()):
        bell = math.sqrt(2 / math.pi) * torch.exp(-(h / b).square() / 2)
        spin = torch.erf(h / b / math.sqrt(2))
        return spin, bell / b, h * spin + b * bell
    z = torch.linspace(-8, 8, 321, dtype=h.dtype, device=h.device)
    pdf = torch.exp(-z.square() / 2)
    pdf = pdf / pdf.sum()
    noise, field = noise[..., None], h[..., None] + b[..., None] * z
    spins = torch.where(cold[..., None], field.sign(), torch.tanh(field / noise))
    energy = field.abs() + torch.where(cold[..., None], 0.0, noise * torch.log1p(torch.exp(-2 * field.abs() / noise)))
    # The mean slope is E[z spin] / b (Stein), which stays accurate where the tanh is steep.
    return spins @ pdf, (spins * z) @ pdf / b, energy @ pdf


def self_consistency(m: Tensor, d: float, T: float = 0.0) -> tuple[Tensor, Tensor]:
    """The map whose fixed points are the overlaps with stored patterns, and the free energy per spin at m:

    $$m_\\mu \\mapsto E_\\xi\\Bigl[\\xi^\\mu \\tanh \\frac{\\sum_\\nu \\xi^\\nu m_\\nu}{T(1-d)}\\Bigr], \\qquad
    f = \\frac{\\sum_\\mu m_\\mu^2}{2(1-d)} - T\\,E_\\xi \\ln 2\\cosh \\frac{\\sum_\\nu \\xi^\\nu m_\\nu}{T(1-d)}.$$

    Args:
        m: overlaps `[..., K]`.
        d: dilution, in [0, 1).
        T: noise, at least 0.

    Returns:
        The image of m, `[..., K]`, and the free energy `[...]`.
    """
    _check(m.shape[-1], d, T)
    columns, _ = _columns(m.shape[-1], d, None, None, None, 0)
    at = torch.tensor([d], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    _, overlaps, energy = columns(m.double(), *at, torch.ones(1, dtype=torch.float64))
    return overlaps, energy


def _columns(K: int, d: float | None, rho: Numbers, r: Numbers, M: Numbers, seed: int) -> tuple[_Columns, str]:
    """The columns to sum over, and how they were made."""
    if (r is None) != (M is None) or (r is not None and rho is not None):
        raise ValueError("expected either rho, or both r and M, or none of them")
    if r is not None:
        qualities, sizes = _each(r, K, "r").tolist(), _each(M, K, "M").tolist()
        for quality, size in zip(qualities, sizes, strict=True):
            _check_examples(quality, size)
        entropy = torch.tensor([dataset_entropy(*pair) for pair in zip(qualities, sizes, strict=True)]).double()
        if math.prod(size + 2 for size in sizes) <= ENUMERATED:
            return _binomial(qualities, [int(size) for size in sizes], entropy), "binomial"
    else:
        entropy = _each(0.0 if rho is None else rho, K, "rho")
        if not bool((entropy >= 0).all() & entropy.isfinite().all()):
            raise ValueError(f"expected rho to be at least 0, got {rho!r}")
    gaussian = bool((entropy > 0).any())
    if 3**K <= ENUMERATED:
        signs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, -1.0]).double()] * K).view(-1, K)
        q = 0.5 ** signs.ne(0).sum(-1).double()
        return _Columns(signs, signs, q, entropy, gaussian), "gaussian" if gaussian else "enumeration"
    if d is None:
        raise ValueError(f"expected 3^K <= {ENUMERATED:,} for a phase diagram, got K = {K}")
    warnings.warn(f"3^{K} columns are too many to enumerate: the equations are averaged over {SAMPLED:,}", stacklevel=3)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(SAMPLED, K, generator=generator, dtype=torch.float64)
    signs = torch.where(drawn < d, 0.0, torch.where(drawn < (1 + d) / 2, 1.0, -1.0)).double()
    return _Columns(signs, signs, None, entropy, gaussian), "sampling"


def _binomial(r: list[float], M: list[int], rho: Tensor) -> _Columns:
    """Every number of right examples, for every pattern."""
    values, signs, odds = [], [], []
    for quality, size in zip(r, M, strict=True):
        k = np.arange(size + 1)
        right = binom.pmf(k, size, (1 + quality) / 2)
        wrong = right[::-1]
        values.append(torch.from_numpy(np.concatenate([[0.0], (2 * k - size) / (size * quality)])))
        total = np.maximum(right + wrong, 1e-300)
        signs.append(torch.from_numpy(np.concatenate([[0.0], (right - wrong) / total])))
        odds.append(torch.from_numpy(np.concatenate([[1.0], (right + wrong) / 2])))
    index = torch.cartesian_prod(*[torch.arange(len(v)) for v in values]).view(-1, len(values))
    V, X, q = (torch.stack([part[index[:, k]] for k, part in enumerate(parts)], -1) for parts in (values, signs, odds))
    return _Columns(V, X, q.prod(-1), rho, present=index.ne(0))  # a tie of examples is no blank


def _solve(
    columns: _Columns, starts: Tensor, d: Tensor, T: Tensor, strength: Tensor, steps: int = 3000
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate from starts `[..., S, K]`: overlaps, free energies, and which have converged.

    The free energy is a square minus a convex function, whose tangent each step minimises: it never rises, and the
    iteration cannot oscillate, so that it needs no damping. Averages over drawn columns know no more than six digits.
    """
    if starts.dim() == 2:
        n, move = _settle(columns, starts.clone(), d, T, strength, steps, 1e-12 if columns.q is not None else 1e-7)
        _, m, energy = columns(n, d, T, strength)
        return m, energy, move < 1e-6
    n, move = starts, torch.ones(())
    for _ in range(steps):
        image, _, _ = columns(n, d, T, strength)
        move = (image - n).abs().amax(-1)
        n = image
        if float(move.max()) < 1e-12:
            break
    _, m, energy = columns(n, d, T, strength)
    return m, energy, move < 1e-6


def _settle(
    columns: _Columns, n: Tensor, d: Tensor, T: Tensor, strength: Tensor, steps: int, tol: float
) -> tuple[Tensor, Tensor]:
    """Iterate starts `[S, K]` in place, each until it moves less than `tol`: where they end, and their last moves."""
    move, going = torch.full((len(n),), math.inf, dtype=n.dtype), torch.arange(len(n))
    for _ in range(steps):
        image = columns(n[going], d, T, strength)[0]
        move[going] = (image - n[going]).abs().amax(-1)
        n[going] = image
        going = going[move[going] >= tol]
        if not len(going):
            break
    return n, move


def _starts(K: int, d: Tensor, n_starts: int, seed: int) -> Tensor:
    """Starts `[..., S, K]` for dilutions `[...]`: hierarchical, equal mixtures, pure ones, and random ones."""
    index = torch.arange(K)
    hierarchical = d[..., None] ** index
    mixtures = [(index < k).double() for k in range(1, K + 1)] + list(torch.eye(K).double()[1:])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(max(0, n_starts - K), K, generator=generator, dtype=torch.float64)
    fixed = torch.cat([torch.stack(mixtures), drawn.sort(-1, descending=True).values, drawn[: n_starts // 4]])
    shape = (*d.shape, *fixed.shape)
    return torch.cat([hierarchical[..., None, :], fixed.expand(shape)], -2) * (1 - d)[..., None, None]


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
    _check(K, d, T)
    columns, method = _columns(K, d, rho, r, M, seed)
    strength = _each(1.0 if strengths is None else strengths, K, "strengths")
    if not bool((strength > 0).all()):
        raise ValueError(f"expected strengths above 0, got {strengths!r}")
    at = torch.tensor([d], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    m, energy, converged = _solve(columns, _starts(K, torch.tensor(d).double(), n_starts, seed), *at, strength)
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
    _check(K, d, T)
    at = torch.tensor([d], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    first = torch.eye(K).double()[start : start + 1] * (1 - d)
    if len(first) != 1:
        raise ValueError(f"expected start to be a pattern from 0 to {K - 1}, got {start!r}")
    # The other patterns grow from a seed that breaks the symmetry between signs, as chance does in a network.
    first = first + 1e-3 * (1 - d) * d ** torch.arange(K).double()
    rows = [_solve(_columns(K, d, None, r, m, 0)[0], first, *at, torch.ones(1).double())[0][0] for m in M]
    return torch.stack(rows).abs()


@dataclass(frozen=True)
class PhaseDiagram:
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
    """
    dilutions = tuple(np.linspace(0.05, 0.95, 12).tolist() if d is None else d)
    noises = tuple(np.linspace(0.02, 1.12, 12).tolist() if T is None else T)
    for dilution in dilutions:
        for noise in noises:
            _check(K, dilution, noise)
    columns, _ = _columns(K, None, rho, None, None, seed)
    grid_d = torch.tensor(dilutions).double()[:, None].expand(-1, len(noises))
    grid_T = torch.tensor(noises).double()[:, None, None]
    starts = _starts(K, grid_d, n_starts, seed)
    m, energy, converged = _solve(columns, starts, grid_d[..., None, None], grid_T, torch.ones(1).double(), steps=600)
    best = torch.where(converged, energy, math.inf).argmin(-1)
    m = m.abs().sort(-1, descending=True).values
    m = m.gather(-2, best[..., None, None].expand(*best.shape, 1, K))[..., 0, :]
    names = tuple(tuple(regime(row, dilution) for row in line) for line, dilution in zip(m, dilutions, strict=True))
    return PhaseDiagram(K, dilutions, noises, m, names)


def _each(value: Numbers, K: int, name: str) -> Tensor:
    """One number for each of K patterns."""
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) != K):
        raise ValueError(f"expected {name} to be one number or {K}, one for each pattern, got {value!r}")
    return numbers.expand(K)


def _check(K: int, d: float, T: float) -> None:
    checks.whole("K", K, low=1)
    checks.between("dilution d", d, 0, 1, inclusive=(True, False))
    checks.between("noise T", T, 0, math.inf, inclusive=(True, False))


def _check_examples(r: float, M: float) -> None:
    checks.between("quality r", r, 0, 1, inclusive=(False, True))
    if not M >= 1 or int(M) != M:
        raise ValueError(f"expected M to be a whole number of at least 1, got {M!r}")
