"""Random numbers that depend on a seed and on each sample's index alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["keyed_uniform"]


def keyed_uniform(seed: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed and each sample's index alone.

    Whatever batches samples come in, in whatever order, by however many workers, each gets the same numbers.

    Args:
        seed: seed of the stream.
        index: numbers of the samples, integers `[N]`.
        shape: shape of the numbers of one sample.

    Returns:
        float64 `[N, *shape]`, from the SplitMix64 hash of (seed, index, position).
    """
    position = torch.arange(math.prod(shape), device=index.device)
    key = _splitmix(_splitmix(torch.full_like(index, seed, dtype=torch.long)) + index.long())
    bits = _splitmix(key[:, None] + position * _GAMMA)
    return ((bits >> 11) & ((1 << 53) - 1)).double().mul_(2.0**-53).view(len(index), *shape)


_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)


def _splitmix(z: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea, Flood, 2014) in wrapping 64-bit integers."""
    z = z + _GAMMA
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))
