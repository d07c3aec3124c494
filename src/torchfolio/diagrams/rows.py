"""Heights of wires: as straight as the order of the wires allows.

Every wire has one height at each column. Neighbours keep a distance; a wire that continues should stay at its height.
This is the linear programme

$$\\min_y \\sum_{(i,j)} w_{ij}\\,|y_i - y_j| + \\varepsilon \\sum_i y_i \\quad\\text{with}\\quad y_j \\ge y_i + g_{ij},
\\; y_i \\ge 0,$$

as in the drawing of layered graphs (Gansner et al. 1993, section 4.2). Its corners are sums of the distances, so that
the heights fall on a grid.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

COMPACT = 1e-3
"""Pull to the top, small against every wish for a straight wire."""


class Rows:
    """Collects heights, distances and wishes, and solves for the heights."""

    def __init__(self) -> None:
        self._count = 0
        self._firm: list[tuple[int, int, float]] = []
        self._soft: list[tuple[int, int, float]] = []
        self._wishes: list[tuple[int, int, float, float]] = []

    def add(self) -> int:
        """A new height."""
        self._count += 1
        return self._count - 1

    def below(self, upper: int, lower: int, gap: float, *, soft: bool = False) -> None:
        """Keep one height at least `gap` below another; a soft distance is dropped where it contradicts a firm one."""
        (self._soft if soft else self._firm).append((upper, lower, gap))

    def level(self, one: int, other: int, weight: float = 1.0, offset: float = 0.0) -> None:
        """Wish `y_other = y_one + offset`."""
        self._wishes.append((one, other, weight, offset))

    def solve(self) -> np.ndarray:
        """The heights, the smallest of them 0 or more."""
        if not self._count:
            return np.zeros(0)
        distances = [*self._firm, *self._consistent()]
        n, m = self._count, len(self._wishes)
        # Unknowns: n heights, then m bounds t with -t <= y_other - y_one - offset <= t.
        rows, columns, values, limits = [], [], [], []
        for upper, lower, gap in distances:
            rows += [len(limits)] * 2
            columns += [upper, lower]
            values += [1.0, -1.0]
            limits.append(-gap)
        for k, (one, other, _, offset) in enumerate(self._wishes):
            for sign in (1.0, -1.0):
                rows += [len(limits)] * 3
                columns += [other, one, n + k]
                values += [sign, -sign, -1.0]
                limits.append(sign * offset)
        cost = np.concatenate([np.full(n, COMPACT), [w for *_, w, _ in self._wishes]])
        matrix = coo_array((values, (rows, columns)), shape=(len(limits), n + m)).tocsr() if limits else None
        found = linprog(cost, A_ub=matrix, b_ub=limits or None, bounds=(0, None), method="highs-ds")
        if found.status != 0:
            raise RuntimeError(f"no heights satisfy the order of the wires: {found.message}")
        return np.round(found.x[:n], 2)

    def _consistent(self) -> list[tuple[int, int, float]]:
        """The soft distances that close no circle with the firm ones and those taken before."""
        after: list[list[int]] = [[] for _ in range(self._count)]
        for upper, lower, _ in self._firm:
            after[upper].append(lower)
        taken = []
        for upper, lower, gap in self._soft:
            if not _reaches(after, lower, upper):
                after[upper].append(lower)
                taken.append((upper, lower, gap))
        return taken


def _reaches(after: list[list[int]], start: int, goal: int) -> bool:
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if node == goal:
            return True
        for f in after[node]:
            if f not in seen:
                seen.add(f)
                stack.append(f)
    return False
