"""Brownian motion over any interval, from a tree of its halves."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from torchfolio.checks import whole
from torchfolio.dynamics.brownian_path import SNAP, Brownian, joined_area

__all__ = ["BrownianInterval"]


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
