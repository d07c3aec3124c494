"""Patterns of -1, 0 and 1, noisy examples of them, states made from them, and squared errors of states against them.

Part of Agliari et al., "Parallel Learning by Multitasking Neural Networks", J. Stat. Mech. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchfolio import checks

__all__ = [
    "check_quality",
    "check_ternary",
    "energy_from_losses",
    "example_set",
    "fill_blanks",
    "generator_for",
    "hierarchical_state",
    "parallel_state",
    "sparse_patterns",
    "sse_losses",
    "to_ternary",
]


def sparse_patterns(N: int, K: int, d: float, samples: int | None = None, seed: int = 0) -> Tensor:
    """Random patterns with blanks: 0 with probability d, -1 and 1 with equal ones.

    Args:
        N: number of spins.
        K: number of patterns.
        d: dilution, in [0, 1).
        samples: sets of patterns; `None` for one without a leading dimension.
        seed: seed of the patterns.

    Returns:
        `[K, N]` or `[samples, K, N]` in float64.
    """
    for value, name in ((N, "N"), (K, "K"), (1 if samples is None else samples, "samples")):
        checks.whole(name, value, low=1)
    checks.between("dilution d", d, 0, 1, inclusive=(True, False))
    shape = (K, N) if samples is None else (samples, K, N)
    u = torch.rand(shape, generator=generator_for(seed, "patterns", torch.device("cpu")), dtype=torch.float64)
    return torch.where(u < d, 0.0, torch.where(u < (1 + d) / 2, 1.0, -1.0)).double()


def example_set(
    patterns: Tensor, r: float | Sequence[float], M: int | Sequence[int], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noisy examples of patterns, $\\eta_i^{\\mu a} = \\xi_i^\\mu \\chi_i^{\\mu a}$ with $\\chi = 1$ with probability (1+r)/2 and -1
    otherwise; blanks stay blank.

    Args:
        patterns: `[..., K, N]`.
        r: quality in (0, 1], one for all patterns or one for each.
        M: number of examples, one for all or one for each.
        seed: seed of the noise.

    Returns:
        Examples `[..., E, N]` and the pattern of each, `[E]`.
    """
    x = check_ternary(patterns, "patterns")
    K = x.shape[-2]
    sizes = torch.as_tensor(M, device=x.device).expand(K)
    quality = torch.as_tensor(r, dtype=torch.float64, device=x.device).expand(K)
    check_quality(quality)
    if sizes.is_floating_point() or not bool((sizes >= 1).all()):
        raise ValueError(f"expected M to be at least 1 example, in whole numbers, got {M!r}")
    labels = torch.arange(K, device=x.device).repeat_interleave(sizes)
    shown = x[..., labels, :]
    generator = generator_for(seed, "examples", x.device)
    u = torch.rand(shown.shape, generator=generator, device=x.device, dtype=torch.float64)
    return torch.where(u < (1 + quality[labels, None]) / 2, shown, -shown), labels


def fill_blanks(cue: Tensor, replicas: int | None = None, seed: int = 0) -> Tensor:
    """States that agree with a cue and are random where it is blank.

    Args:
        cue: `[..., N]`, entries -1, 0 and 1; all zeros give random states.
        replicas: states for each cue; `None` for one without a dimension of its own.
        seed: seed of the signs.

    Returns:
        `[..., N]`, or `[..., replicas, N]`.
    """
    x = check_ternary(cue, "cue", blank=True)
    if replicas is not None:
        checks.whole("replicas", replicas, low=1)
        x = x[..., None, :].expand(*x.shape[:-1], replicas, x.shape[-1])
    generator = generator_for(seed, "blanks", x.device)
    signs = torch.randint(2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
    return torch.where(x == 0, signs, x)


def hierarchical_state(patterns: Tensor, seed: int = 0) -> Tensor:
    """The state `[..., N]` in which each spin serves the first pattern that is not blank there, at random if none."""
    x = check_ternary(patterns, "patterns")
    first = (x != 0).long().argmax(-2, keepdim=True)
    return fill_blanks(x.gather(-2, first)[..., 0, :], seed=seed)


def parallel_state(patterns: Tensor, seed: int = 0) -> Tensor:
    """The state `[..., N]` of the patterns' majority, $\\sigma_i = \\operatorname{sign} \\sum_\\mu \\xi_i^\\mu$, at random on ties."""
    return fill_blanks(check_ternary(patterns, "patterns").sum(-2).sign(), seed=seed)


def sse_losses(states: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of states as reconstructions of patterns and of their negatives:
    $L_\\mu^\\pm = \\frac1{2N} \\lVert \\xi^\\mu \\mp \\sigma \\rVert^2$.

    Args:
        states: `[..., R, N]`.
        patterns: `[..., K, N]`.

    Returns:
        $L^+$ and $L^-$, `[..., R, K]`.
    """
    x = check_ternary(patterns, "patterns").double()
    s = states.double()[..., :, None, :]
    x = x[..., None, :, :]
    return (x - s).square().mean(-1) / 2, (x + s).square().mean(-1) / 2


def energy_from_losses(plus: Tensor, minus: Tensor, blanks: Tensor) -> Tensor:
    """Energy per spin of the storing rule by the squared errors, exactly:
    $\\frac HN = -\\frac12 \\sum_\\mu [(1 - \\hat d_\\mu/2)^2 - L_\\mu^+ L_\\mu^-]$, so that minima of one are minima of the other.

    In the raw unit (`normalize=False`), with $J_{ii}$ included.

    Args:
        plus: $L^+$, `[..., K]`.
        minus: $L^-$, `[..., K]`.
        blanks: share of blanks in each pattern, `[..., K]`.
    """
    return -((1 - blanks / 2).square() - plus * minus).sum(-1) / 2


def to_ternary(x: Tensor, d: float) -> Tensor:
    """Real data as patterns with blanks: the share d of entries nearest to their row's median becomes blank, the others
    the sign of their difference from it.

    Args:
        x: rows `[..., N]`; images are flattened first.
        d: share of blanks, in [0, 1); more where entries are equal to the median.
    """
    checks.finite("x", x)
    checks.between("the share of blanks d", d, 0, 1, inclusive=(True, False))
    centred = x.double() - x.double().median(-1, keepdim=True).values
    rank = centred.abs().argsort(-1).argsort(-1)
    return torch.where(rank < round(d * x.shape[-1]), 0.0, centred.sign()).double()


def check_ternary(x: Tensor, name: str, blank: bool = False) -> Tensor:
    """`x` if its entries are -1, 0 and 1 and no row is all blank (unless it may be)."""
    if not isinstance(x, Tensor) or x.dim() < (1 if blank else 2) or not x.numel():
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected {name} as a tensor [{'...' if blank else '..., K'}, N], got {got}")
    if not bool(((x == 0) | (x.abs() == 1)).all()):
        raise ValueError(f"expected {name} with entries -1, 0 and 1; to_ternary makes them from real data")
    if not blank and not bool((x != 0).any(-1).all()):
        raise ValueError(f"expected {name} that are not all blank, got a row of zeros")
    return x


def check_quality(r: Tensor) -> None:
    """Refuse qualities outside (0, 1]."""
    if not bool(((r > 0) & (r <= 1)).all()):
        raise ValueError(f"expected quality r in (0, 1], got {r.tolist()}")


def generator_for(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """A generator for each purpose, so that one seed given to several functions does not tie their draws together."""
    state = np.random.SeedSequence([checks.whole("seed", seed, low=0), *purpose.encode()]).generate_state(1)
    return torch.Generator(device=device).manual_seed(int(state[0]))
