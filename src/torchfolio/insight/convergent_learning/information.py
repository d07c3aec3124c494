"""Mutual information between units, an alternative to their correlation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Bias = Literal["miller", "official", "none"]
_ZERO = 1e-6


def mutual_information(a: Tensor, b: Tensor, bins: int = 10, bias: Bias = "miller") -> float:
    """Mutual information of two units from a histogram, in nats.

    A bin of its own takes the zeros of a rectified unit ($|a| < 10^{-6}$); the other values fall into `bins`
    equally populated ones. From the plug-in estimate over $M$ samples the first-order bias
    $(K_x - 1)(K_y - 1) / 2M$ is subtracted, with $K$ the numbers of bins that occur.

    Args:
        a: `[M]`.
        b: `[M]`.
        bins: besides the one of zeros.
        bias: `"miller"` as above; `"official"` for $K_x K_y / (2 M \\ln 2)$, which the paper's released code
            subtracts; `"none"`.

    Raises:
        ValueError: as `mi_matrix`.
    """
    return float(mi_matrix(torch.as_tensor(a).reshape(-1, 1), torch.as_tensor(b).reshape(-1, 1), bins, bias))


def mi_matrix(a: Tensor, b: Tensor, bins: int = 10, bias: Bias = "miller") -> Tensor:
    """Mutual information of every unit of one layer with every unit of another, in nats.

    Sees dependence of any form where the correlation sees linear dependence; for `bipartite_match` it may take the
    correlation's place. Constant units get 0.

    Args:
        a: activations `[M, S_1]`.
        b: activations of the same samples `[M, S_2]`.
        bins: number of bins, see `mutual_information`.
        bias: whether the bias is corrected, see `mutual_information`.

    Returns:
        `[S_1, S_2]`, float64.

    Raises:
        ValueError: on numbers of samples that differ, values that are not finite, fewer than two bins, or an
            unknown bias.
    """
    if bias not in ("miller", "official", "none"):
        raise ValueError(f"expected bias to be 'miller', 'official' or 'none', got {bias!r}")
    if bins < 2:
        raise ValueError(f"expected at least 2 bins, got {bins}")
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b) or not len(a):
        raise ValueError(
            f"expected activations [M, S] of the same M samples, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("the activations hold NaN or infinite values")
    samples = len(a)
    x, y = (_one_hot(t.detach().cpu(), bins) for t in (a, b))
    # Float32 counts are exact up to 2^24 in each product.
    joint = torch.stack([(u.flatten(1).T @ v.flatten(1)).double() for u, v in _chunks(x, y)]).sum(0) / samples
    joint = joint.view(x.shape[1], x.shape[2], y.shape[1], y.shape[2]).transpose(1, 2)
    p, q = joint.sum(3), joint.sum(2)
    plug_in = _plogp(joint).sum((2, 3)) - _plogp(p).sum(2) - _plogp(q).sum(2)
    kx, ky = (p > 0).sum(2).double(), (q > 0).sum(2).double()
    if bias == "miller":
        return plug_in - (kx - 1) * (ky - 1) / (2 * samples)
    return plug_in - (kx * ky / (2 * samples * math.log(2)) if bias == "official" else 0)


def _chunks(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(u.float(), v.float()) for u, v in zip(x.split(65_536), y.split(65_536), strict=True)]


def _one_hot(x: Tensor, bins: int) -> Tensor:
    """Membership in the bins, `[M, S, bins + 1]`; the first bin is that of zeros."""
    codes = torch.zeros(x.shape, dtype=torch.int64)
    for s, unit in enumerate(x.double().T):
        rest = unit.abs() >= _ZERO
        values = unit[rest]
        if not len(values):
            continue
        ranks = values.sort().values
        edges = ranks[torch.arange(1, bins) * len(ranks) // bins]
        codes[rest, s] = 1 + torch.searchsorted(edges, values.contiguous(), right=True)
    return torch.nn.functional.one_hot(codes, bins + 1).to(torch.uint8)


def _plogp(p: Tensor) -> Tensor:
    return torch.special.xlogy(p, p)
