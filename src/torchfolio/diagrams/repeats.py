"""Parts of a network that are repeated: found, and drawn once between parentheses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torchfolio.diagrams.equality import TOLD
from torchfolio.diagrams.graph import Draft, Graph, Value

__all__ = ["fold_repeats"]

LONGEST = 6
"""Most modules and operations side by side that are looked at as one part."""


@dataclass(frozen=True)
class _Item:
    """A module, or an operation between modules: its steps, and what it is apart from names."""

    module: str
    steps: tuple[Draft, ...]
    shape: Hashable


def fold_repeats(
    graph: Graph, steps: list[Draft], outputs: Sequence[Value], least: int
) -> tuple[list[Draft], dict[str, int]]:
    """One copy in place of at least so many modules that follow each other, are built alike and pass on what they get.

    What each of them takes must come from the one before it, the first one's from before all, or be the same for all; and
    nothing but the last may be used after. Weights may differ, lengths of axes may not.

    Args:
        graph: whose axes are made one where copies become one.
        steps: its operations in order.
        outputs: its results.
        least: number of copies from which they are folded.

    Returns:
        The operations that are left, each with how many `times` it is done, and the paths of what is repeated.
    """
    return _Folding(graph, outputs, least).run(steps)


class _Folding:
    def __init__(self, graph: Graph, outputs: Sequence[Value], least: int) -> None:
        self.graph, self.outputs, self.least = graph, outputs, least
        self.repeats: dict[str, int] = {}
        self.steps: list[Draft] = []

    def run(self, steps: list[Draft]) -> tuple[list[Draft], dict[str, int]]:
        self.steps = list(steps)
        self._within(list(steps), 0)
        return self.steps, self.repeats

    def _within(self, steps: list[Draft], depth: int) -> None:
        """Fold among the children of a module, and then within each of them that is left."""
        items = self._items(steps, depth)
        start = 0
        while start < len(items):
            found = self._longest(items, start)
            if found is None:
                start += 1
                continue
            period, count = found
            first = items[start : start + period]
            self._fold(_copies(items, start, period, count), depth, first)
            del items[start + period : start + count * period]
            start += period
        for item in items:
            if item.module:
                stack = [path for path, _ in item.steps[0].stack]
                self._within(list(item.steps), stack.index(item.module) + 1)

    def _items(self, steps: list[Draft], depth: int) -> list[_Item]:
        def place(step: Draft) -> str:
            return step.stack[depth][0] if len(step.stack) > depth else ""

        items: list[_Item] = []
        for module, group in groupby(steps, place):
            members = tuple(group)
            parts = [members] if module else [(s,) for s in members]
            items += [_Item(module, part, self._shape(part)) for part in parts]
        return items

    def _shape(self, steps: Sequence[Draft]) -> Hashable:
        """What operations are apart from their names, weights and inputs."""
        sizes = self.graph.size
        return tuple(
            (
                s.kind,
                s.code,
                tuple((k, str(s.params[k])) for k in TOLD if s.params.get(k)),
                tuple(tuple(tuple(sizes[a] for a in v.axes) for v in own) for own in (s.inputs, s.outputs, s.weights)),
            )
            for s in steps
        )

    def _longest(self, items: Sequence[_Item], start: int) -> tuple[int, int] | None:
        """How many items make a part that is repeated from here on, and how often it is."""
        best = None
        for period in range(1, min(LONGEST, (len(items) - start) // self.least) + 1):
            part = items[start : start + period]
            if not any(item.module for item in part):
                continue
            count = 1
            while [i.shape for i in items[start + count * period : start + (count + 1) * period]] == [
                i.shape for i in part
            ]:
                count += 1
            if count < self.least or (best is not None and count * period <= best[0] * best[1]):
                continue
            if self._chained(_copies(items, start, period, count)):
                best = period, count
        return best

    def _chained(self, copies: list[list[Draft]]) -> bool:
        """Whether each copy does the same to what the copy before it gives."""
        place = {
            id(o): (c, j, k)
            for c, steps in enumerate(copies)
            for j, s in enumerate(steps)
            for k, o in enumerate(s.outputs)
        }

        def source(copy: int, value: Value) -> Hashable:
            """How many copies back a tensor comes from, and where there; or that it comes from elsewhere."""
            made = place.get(id(value.root))
            return (made and (copy - made[0], *made[1:])) or id(value.root)

        first, *later = ([source(c, v) for s in steps for v in s.inputs] for c, steps in enumerate(copies))
        passed: dict[Hashable, Hashable] = {}  # of what each copy gives to the next, what the first one takes
        for mine, *theirs in zip(first, *later, strict=True):
            if any(other != theirs[0] for other in theirs):
                return False
            before = isinstance(theirs[0], tuple) and theirs[0][0] == 1
            if isinstance(mine, tuple) if before else mine != theirs[0]:
                return False
            if before and passed.setdefault(theirs[0], mine) != mine:
                return False
        inside = {id(s) for steps in copies for s in steps}
        after = [v for s in self.steps if id(s) not in inside for v in s.inputs] + list(self.outputs)
        used = {place[id(v.root)][0] for v in after if id(v.root) in place}
        return bool(passed) and used <= {len(copies) - 1}

    def _fold(self, copies: list[list[Draft]], depth: int, first: Sequence[_Item]) -> None:
        """Keep the first copy; what the last one gave, it gives."""
        for one, last in zip(copies[0], copies[-1], strict=True):
            for mine, theirs in zip(one.outputs, last.outputs, strict=True):
                for a, b in zip(mine.axes, theirs.axes, strict=True):
                    self.graph.merge(a, b)
                theirs.origin = mine
        gone = {id(s) for steps in copies[1:] for s in steps}
        self.steps = [s for s in self.steps if id(s) not in gone]
        modules = [item.module for item in first if item.module]
        if len(first) == 1:
            path = modules[0]
        else:
            path = f"{modules[0]}…λ"
            for step in copies[0]:
                step.stack = (*step.stack[:depth], (path, ""), *step.stack[depth:])
        self.repeats[path] = len(copies)
        for step in copies[0]:
            step.times *= len(copies)


def _copies(items: Sequence[_Item], start: int, period: int, count: int) -> list[list[Draft]]:
    """The steps of so many parts of so many items each, which follow each other."""
    places = [start + c * period for c in range(count)]
    return [[s for item in items[at : at + period] for s in item.steps] for at in places]
