"""The self-consistency equations of multitasking Hopfield networks, and how they are solved from many starts.

The expectation over columns is taken in four ways: enumerated, over binomials, over normal noise, and sampled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from torchfolio.shown import Shown
from torchfolio.theory.hopfield_limits import check_examples, check_settings, dataset_entropy

__all__ = ["Columns", "Numbers", "columns_of", "one_each", "self_consistency", "solve", "starting_points"]

ENUMERATED = 1_000_000  # most columns that are summed over exactly


SAMPLED = 200_000  # columns drawn where there are more


Numbers = float | Sequence[float] | None


class Columns(Shown):
    """Columns of K patterns as a site sees them, with their probabilities, after `V` came in place of the patterns.

    Args:
        V: values $\\hat\\eta$ at a site, `[P, K]`: 0 where blank, otherwise around a sign.
        X: expected sign of the pattern itself, `[P, K]`.
        q: probability of the column given which entries are blank, `[P]`; `None` where columns were drawn from d.
        rho: entropy of the examples of each pattern, `[K]`.
        gaussian: whether `V` holds the signs, around which the values are normal of variance `rho`.
        present: mask of the entries that are not blank, `[P, K]`; those of `V` that are not 0 by default.
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
    check_settings(m.shape[-1], d, T)
    columns, _ = columns_of(m.shape[-1], d, None, None, None, 0)
    at = torch.tensor([d], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    _, overlaps, energy = columns(m.double(), *at, torch.ones(1, dtype=torch.float64))
    return overlaps, energy


def columns_of(K: int, d: float | None, rho: Numbers, r: Numbers, M: Numbers, seed: int) -> tuple[Columns, str]:
    """The columns to sum over, and how they were made."""
    if (r is None) != (M is None) or (r is not None and rho is not None):
        raise ValueError("expected either rho, or both r and M, or none of them")
    if r is not None:
        qualities, sizes = one_each(r, K, "r").tolist(), one_each(M, K, "M").tolist()
        for quality, size in zip(qualities, sizes, strict=True):
            check_examples(quality, size)
        entropy = torch.tensor([dataset_entropy(*pair) for pair in zip(qualities, sizes, strict=True)]).double()
        if math.prod(size + 2 for size in sizes) <= ENUMERATED:
            return _binomial(qualities, [int(size) for size in sizes], entropy), "binomial"
    else:
        entropy = one_each(0.0 if rho is None else rho, K, "rho")
        if not bool((entropy >= 0).all() & entropy.isfinite().all()):
            raise ValueError(f"expected rho to be at least 0, got {rho!r}")
    gaussian = bool((entropy > 0).any())
    if 3**K <= ENUMERATED:
        signs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, -1.0]).double()] * K).view(-1, K)
        q = 0.5 ** signs.ne(0).sum(-1).double()
        return Columns(signs, signs, q, entropy, gaussian), "gaussian" if gaussian else "enumeration"
    if d is None:
        raise ValueError(f"expected 3^K <= {ENUMERATED:,} for a phase diagram, got K = {K}")
    warnings.warn(f"3^{K} columns are too many to enumerate: the equations are averaged over {SAMPLED:,}", stacklevel=3)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(SAMPLED, K, generator=generator, dtype=torch.float64)
    signs = torch.where(drawn < d, 0.0, torch.where(drawn < (1 + d) / 2, 1.0, -1.0)).double()
    return Columns(signs, signs, None, entropy, gaussian), "sampling"


def _binomial(r: list[float], M: list[int], rho: Tensor) -> Columns:
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
    return Columns(V, X, q.prod(-1), rho, present=index.ne(0))  # a tie of examples is no blank


def solve(
    columns: Columns, starts: Tensor, d: Tensor, T: Tensor, strength: Tensor, steps: int = 3000
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
    columns: Columns, n: Tensor, d: Tensor, T: Tensor, strength: Tensor, steps: int, tol: float
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


def starting_points(K: int, d: Tensor, n_starts: int, seed: int) -> Tensor:
    """Starts `[..., S, K]` for dilutions `[...]`: hierarchical, equal mixtures, pure ones, and random ones."""
    index = torch.arange(K)
    hierarchical = d[..., None] ** index
    mixtures = [(index < k).double() for k in range(1, K + 1)] + list(torch.eye(K).double()[1:])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(max(0, n_starts - K), K, generator=generator, dtype=torch.float64)
    fixed = torch.cat([torch.stack(mixtures), drawn.sort(-1, descending=True).values, drawn[: n_starts // 4]])
    shape = (*d.shape, *fixed.shape)
    return torch.cat([hierarchical[..., None, :], fixed.expand(shape)], -2) * (1 - d)[..., None, None]


def one_each(value: Numbers, K: int, name: str) -> Tensor:
    """One number for each of K patterns."""
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) != K):
        raise ValueError(f"expected {name} to be one number or {K}, one for each pattern, got {value!r}")
    return numbers.expand(K)
