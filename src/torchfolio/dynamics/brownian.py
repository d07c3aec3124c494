"""Brownian motion: one path, however it is queried, at little memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import whole

__all__ = ["Brownian", "BrownianGrid", "BrownianInterval"]

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


class _Node:
    """An interval of the tree; its two halves are the nodes 2k and 2k + 1."""

    __slots__ = ("index", "left", "parent", "right", "s", "t")

    def __init__(self, s: float, t: float, index: int, parent: _Node | None) -> None:
        self.s, self.t, self.index, self.parent = s, t, index, parent
        self.left: _Node | None = None
        self.right: _Node | None = None


class BrownianInterval(Brownian):
    """Brownian motion that answers for any interval, always alike.

    A binary tree of intervals grows where queries fall. The increment over a left half is drawn from the Brownian
    bridge of the whole, with numbers that depend on the node alone, and the right half is the rest:

        W(s, m) ~ N((m - s) / (t - s) · W(s, t), (m - s) (t - m) / (t - s)),    W(m, t) = W(s, t) - W(s, m)

    Values are not stored but computed again from the parents, through a small cache. A long interval is halved until
    it is only some 30 times as long as the query, so that sweeps in both directions find most parents in the cache. The path
    depends on the seed and, between solves on other grids, on the order in which new times are asked for.

    With `levy=True` each interval also has its space-time Lévy area H, and halves are drawn from the bridge of both. With
    l and r the lengths of the halves, h = l + r, a = v l² / h, b = v r² / h, c = v / √3, v = ½ √(l r / (l³ + r³)) and
    normal X, Y:

        W(s, m) = l / h W + 6 l r / h² H + 2 (a l + b r) / h X,    H(s, m) = l² / h² H - a X + c r Y,
                                                                   H(m, t) = r² / h² H - b X - c l Y

    Args:
        t0: start of the interval.
        t1: end of the interval, above `t0`.
        shape: shape of the path's values.
        seed: number that decides the path.
        dtype: dtype of the increments, in floating point.
        device: device of the increments.
        cache: number of values kept, at least 2.
        levy: whether the path has areas, which solvers such as `ShARK` want; another one than without.

    Reference:
        Kidger, "On Neural Differential Equations", section 5.5; Foster, Oberhauser, Lyons, SIAM J. Numer. Anal. 58,
        2020 (areas).

    >>> w = BrownianInterval(0.0, 1.0, (3,), seed=1)
    >>> torch.allclose(w(0.0, 0.3) + w(0.3, 0.7), w(0.0, 0.7), atol=1e-6)
    True
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
        cache: int = 64,
        levy: bool = False,
    ) -> None:
        super().__init__(t0, t1, shape, seed, dtype=dtype, device=device)
        self.levy = levy
        self.cache = whole("cache", cache, 2)
        self._root = self._last = _Node(self.t0, self.t1, 1, None)
        self._values: OrderedDict[int, Tensor] = OrderedDict()

    def _increment(self, s: float, t: float) -> Tensor:
        total = None
        for node in self._cover(max(s, self.t0), min(t, self.t1)):
            value = self._value(node)[0] if self.levy else self._value(node)
            total = value if total is None else total + value
        assert total is not None
        return total

    def _area(self, s: float, t: float) -> Tensor:
        if not self.levy:
            raise ValueError("expected a BrownianInterval with levy=True where areas are asked for")
        nodes = self._cover(max(s, self.t0), min(t, self.t1))
        values = [self._value(node) for node in nodes]
        return joined_area([(node.t - node.s, v[0], v[1]) for node, v in zip(nodes, values, strict=True)])

    def _cover(self, s: float, t: float) -> list[_Node]:
        """Nodes that make up an interval, from left to right; the tree grows where it must."""
        sliver, length = SNAP * (self.t1 - self.t0), t - s
        node = self._last
        while node.parent is not None and not (node.s - sliver <= s and t <= node.t + sliver):
            node = node.parent
        cover, todo = [], [(node, s, t)]
        while todo:
            node, s, t = todo.pop()
            at_start, at_end = s - node.s <= sliver, node.t - t <= sliver
            if at_start and at_end:
                cover.append(node)
                continue
            if node.left is None:
                half = (node.s + node.t) / 2
                far = node.t - node.s > 32 * length
                self._split(node, half if far else t if at_start else s)
            assert node.left is not None
            assert node.right is not None
            m = node.left.t
            if t > m + sliver:
                todo.append((node.right, max(s, m), t))
            if s < m - sliver:
                todo.append((node.left, s, min(t, m)))
        self._last = cover[-1]
        return cover

    def _split(self, node: _Node, m: float) -> None:
        node.left = _Node(node.s, m, 2 * node.index, node)
        node.right = _Node(m, node.t, 2 * node.index + 1, node)

    def _value(self, node: _Node) -> Tensor:
        """Increment over a node, from the nearest ancestor whose value is known."""
        path: list[_Node] = []
        values = self._values
        while node.index not in values and node.parent is not None:
            path.append(node)
            node = node.parent
        value = values.get(node.index)
        if value is None:
            length = self.t1 - self.t0
            if self.levy:
                value = self._normal(1, 2)
                value[0] *= math.sqrt(length)
                value[1] *= math.sqrt(length / 12)
            else:
                value = self._normal(1) * math.sqrt(length)
            self._keep(node.index, value)
        else:
            values.move_to_end(node.index)
        for child in reversed(path):
            parent = child.parent
            assert parent is not None
            assert parent.left is not None
            m, length = parent.left.t, parent.t - parent.s
            to, rest = m - parent.s, parent.t - m
            if self.levy:
                left, right = self._halves(value, to, rest, self._normal(2 * parent.index, 2))
            else:
                left = self._normal(2 * parent.index).mul_(math.sqrt(to * rest / length)).add_(value, alpha=to / length)
                right = value - left
            self._keep(2 * parent.index, left)
            self._keep(2 * parent.index + 1, right)
            value = left if child is parent.left else right
        return value

    @staticmethod
    def _halves(value: Tensor, left: float, right: float, normal: Tensor) -> tuple[Tensor, Tensor]:
        """W and H of the two parts of an interval `[2, ...]` each, from those of the whole."""
        length, (w, h), (x, y) = left + right, value, normal
        v = 0.5 * math.sqrt(left * right / (left**3 + right**3))
        a, b, c = v * left**2 / length, v * right**2 / length, v / math.sqrt(3)
        w_left = left / length * w + 6 * left * right / length**2 * h + 2 * (a * left + b * right) / length * x
        h_left = (left / length) ** 2 * h - a * x + c * right * y
        h_right = (right / length) ** 2 * h - b * x - c * left * y
        return torch.stack([w_left, h_left]), torch.stack([w - w_left, h_right])

    def _keep(self, index: int, value: Tensor) -> None:
        self._values[index] = value
        if len(self._values) > self.cache:
            self._values.popitem(last=False)
