"""The base of paths of Brownian motion."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import whole

__all__ = ["SNAP", "Brownian", "joined_area", "mix"]

SNAP = 1e-10  # of the whole interval: times as close as this are one
MASK = (1 << 64) - 1


def mix(seed: int, index: int) -> int:
    """Seed of a part from the whole's: splitmix64 of both, so that neighbours have nothing in common."""
    z = (seed * 0x9E3779B97F4A7C15 + (index % MASK) * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


class Brownian(ABC):
    """A path of Brownian motion on an interval, given by its increments.

    Args:
        t0: start of the interval.
        t1: end of the interval, above `t0`.
        shape: shape of the path's values.
        seed: number that decides the path.
        dtype: dtype of the increments, in floating point.
        device: device of the increments.
    """

    def __init__(
        self,
        t0: float,
        t1: float,
        shape: Sequence[int] = (),
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not -math.inf < t0 < t1 < math.inf:
            raise ValueError(f"expected t0 < t1, got {t0} and {t1}")
        if not dtype.is_floating_point:
            raise ValueError(f"expected dtype in floating point, got {dtype}")
        self.t0, self.t1 = float(t0), float(t1)
        self.shape = tuple(whole("shape", n, 0) for n in shape)
        self.seed = whole("seed", seed)
        self.dtype, self.device = dtype, torch.device(device)
        self._generator: torch.Generator | None = None

    def increment(self, s: float, t: float) -> Tensor:
        """W(t) - W(s); minus that of the way back where t is before s.

        Raises:
            ValueError: if a time is outside the interval.
        """
        s, t = float(s), float(t)
        sliver = SNAP * (self.t1 - self.t0)
        if not (self.t0 - sliver <= min(s, t) and max(s, t) <= self.t1 + sliver):
            raise ValueError(f"expected times within [{self.t0:g}, {self.t1:g}], got {s:g} and {t:g}")
        if abs(s - t) <= sliver:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self._increment(s, t) if s < t else -self._increment(t, s)

    __call__ = increment

    def area(self, s: float, t: float) -> tuple[Tensor, Tensor]:
        """W(t) - W(s), and the space-time Lévy area H of the path between s and t.

            H = 1 / (t - s) ∫ (W(s, r) - (r - s) / (t - s) W(s, t)) dr ~ N(0, (t - s) / 12)

        is independent of the increment, and tells solvers on which side of the straight line the path went.

        Raises:
            ValueError: if a time is outside the interval, t is not after s, or the path was made without areas.
        """
        s, t = float(s), float(t)
        if not s < t:
            raise ValueError(f"expected an interval whose end is after its start, got {s:g} and {t:g}")
        w = self.increment(s, t)
        return w, self._area(s, t)

    @abstractmethod
    def _increment(self, s: float, t: float) -> Tensor: ...

    @abstractmethod
    def _area(self, s: float, t: float) -> Tensor: ...

    def _normal(self, index: int, *lead: int) -> Tensor:
        """Standard normal numbers that depend on the seed and the index alone."""
        if self._generator is None:
            self._generator = torch.Generator(self.device)
        self._generator.manual_seed(mix(self.seed, index) >> 1)
        return torch.randn((*lead, *self.shape), generator=self._generator, dtype=self.dtype, device=self.device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_generator": None}  # made again where it is needed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.t0:g}, {self.t1:g}, {self.shape}, seed={self.seed})"


def joined_area(parts: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    """H over an interval from the length, W and H of its parts: (l + r) H = l H_l + r H_r + ½ (r W_l - l W_r)."""
    length, w, h = parts[0]
    for other, w1, h1 in parts[1:]:
        total = length + other
        h = (length * h + other * h1 + (other * w - length * w1) / 2) / total
        length, w = total, w + w1
    return h
