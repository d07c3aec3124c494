"""Brownian motion at the times of a fixed grid."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from torchfolio.checks import whole
from torchfolio.dynamics.brownian_path import SNAP, Brownian, joined_area

__all__ = ["BrownianGrid"]


class BrownianGrid(Brownian):
    """Brownian motion that is queried at the times of a fixed grid only: the fast way for fixed steps.

    Increments are drawn for blocks of steps from a seed of the block; two blocks are kept, so that a sweep in either
    direction draws each once and memory does not grow with the steps.

    Args:
        grid: times `[N + 1]`, rising or falling.
        shape: shape of the path's values.
        seed: number that decides the path.
        dtype: dtype of the increments, in floating point.
        device: device of the increments.
        block: number of steps drawn at once, at least 1. It belongs to the path: another one gives another path.
    """

    def __init__(
        self,
        grid: Sequence[float] | Tensor,
        shape: Sequence[int] = (),
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block: int = 32,
    ) -> None:
        times = sorted(float(t) for t in grid)
        if len(times) < 2 or not all(s < t for s, t in zip(times, times[1:], strict=False)):
            raise ValueError(f"expected grid to be at least 2 different times, got {len(times)}")
        super().__init__(times[0], times[-1], shape, seed, dtype=dtype, device=device)
        self.times, self.block = times, whole("block", block, 1)
        self._blocks: OrderedDict[int, Tensor] = OrderedDict()

    def _increment(self, s: float, t: float) -> Tensor:
        i, j = self._index(s), self._index(t)
        total = self._step(i)
        for k in range(i + 1, j):
            total = total + self._step(k)
        return total

    def _area(self, s: float, t: float) -> Tensor:
        parts = []
        for k in range(self._index(s), self._index(t)):
            length = self.times[k + 1] - self.times[k]
            # Numbers of their own, so that increments are the same whether or not areas are asked for.
            parts.append((length, self._step(k), self._normal(-1 - k) * math.sqrt(length / 12)))
        return joined_area(parts)

    def _index(self, t: float) -> int:
        sliver = SNAP * (self.t1 - self.t0)
        i = bisect_left(self.times, t - sliver)
        if i == len(self.times) or self.times[i] > t + sliver:
            raise ValueError(f"expected times of the grid, got {t:g}; BrownianInterval answers for any")
        return i

    def _step(self, k: int) -> Tensor:
        n, r = divmod(k, self.block)
        block = self._blocks.get(n)
        if block is None:
            times = self.times[n * self.block : (n + 1) * self.block + 1]
            scale = [math.sqrt(t - s) for s, t in zip(times, times[1:], strict=False)]
            block = self._normal(n, len(scale))
            block *= torch.tensor(scale, dtype=self.dtype, device=self.device).view(-1, *[1] * len(self.shape))
            self._blocks[n] = block
            if len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return block[r]
