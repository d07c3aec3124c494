"""Equal blocks of a field on a regular grid, and the field from its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from torchfolio import checks

__all__ = ["partition", "unpartition"]


def partition(field: Tensor, experts: Sequence[int]) -> Tensor:
    """Cut a field into equal blocks, `[B, n_1, n_2, ..., *rest]` to `[B, E, points of a block, *rest]`.

    Raises:
        ValueError: if a number of experts does not divide its axis.
    """
    shape = field.shape[1 : 1 + len(experts)]
    for k, (n, e) in enumerate(zip(shape, experts, strict=True)):
        if checks.whole("experts", e, 1) and n % e:
            raise ValueError(f"expected the number of experts to divide axis {k} of {n} points, got {e}")
    d, rest = len(experts), field.shape[1 + len(experts) :]
    cut = field.reshape(len(field), *(s for n, e in zip(shape, experts, strict=True) for s in (e, n // e)), *rest)
    order = [0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), *range(2 * d + 1, cut.dim())]
    return cut.permute(order).reshape(len(field), math.prod(experts), -1, *rest)


def unpartition(blocks: Tensor, experts: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The inverse of `partition`, for a grid of this shape."""
    d, rest = len(experts), blocks.shape[3:]
    cut = blocks.reshape(len(blocks), *experts, *(n // e for n, e in zip(shape, experts, strict=True)), *rest)
    order = [0, *(k for pair in zip(range(1, d + 1), range(d + 1, 2 * d + 1), strict=True) for k in pair)]
    return cut.permute([*order, *range(2 * d + 1, cut.dim())]).reshape(len(blocks), *shape, *rest)
