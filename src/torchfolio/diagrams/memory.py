"""Tensors that are used more than once: copied where the uses are near, named and picked up again where one is far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torchfolio.diagrams.graph import Draft, Graph, Value

__all__ = ["with_copies"]

NEAR = {1: 6, 2: 6, 3: 2}
"""Columns across which a copy of a tensor is drawn, by its number of axes, none for more; it is picked up by its name
farther on. The wires of two copies cross each other, those of each axis all the others."""

MOST = 3
"""Copies that are drawn."""


def with_copies(graph: Graph, steps: list[Draft], keep: bool) -> list[Draft]:
    """With an explicit copy wherever a tensor is used more than once.

    Args:
        graph: whose inputs and outputs are used too.
        steps: its operations.
        keep: whether what is used far away is put into memory and taken from there.
    """
    return _Copies(graph, steps, keep).run()


class _Copies:
    def __init__(self, graph: Graph, steps: list[Draft], keep: bool) -> None:
        self.graph, self.steps, self.keep = graph, steps, keep
        self.before: dict[int, list[Draft]] = defaultdict(list)
        self.columns: list[int] = []
        self.saved = 0

    def run(self) -> list[Draft]:
        ready: dict[int, int] = {}
        for step in self.steps:
            self.columns.append(max((ready.get(id(v.root), 0) for v in step.inputs), default=0))
            ready |= {id(o): self.columns[-1] + 1 for o in step.outputs}
        uses: dict[int, list[tuple[int, Value]]] = defaultdict(list)
        for i, step in enumerate(self.steps):
            for value in step.inputs:
                uses[id(value.root)].append((i, value))
        for value in self.graph.outputs:
            uses[id(value.root)].append((len(self.steps), value))
        self.columns.append(max(self.columns, default=0) + 1)
        for value in [*self.graph.inputs, *(o for s in self.steps for o in s.outputs)]:
            if id(value) in uses:
                self._serve(value, uses[id(value)])
        ordered = []
        for i in range(len(self.steps) + 1):
            ordered += self.before[i]
            ordered += self.steps[i : i + 1]
        return ordered

    def _serve(self, source: Value, uses: list[tuple[int, Value]]) -> None:
        """Give every use of a tensor a result of its own."""
        start = self.columns[uses[0][0]]
        most = NEAR.get(len(source.axes), -1) if source.axes else len(self.steps)
        far = [u for u in uses[1:] if self.columns[u[0]] - start > most and u[0] < len(self.steps)] if self.keep else []
        near = [u for u in uses if not any(u is f for f in far)]
        if self.keep and source.axes:
            rest = [u for u in near[MOST:] if u[0] < len(self.steps)]
            far, near = [*rest, *far], [u for u in near if not any(u is r for r in rest)]
        at = near[0][0]
        if far:
            self.saved += 1
            for i, use in far:
                self._load(i, use)
            kept = Value(list(source.axes), source)
            places = [i for i, _ in uses]
            save = Draft("save", [source], [kept], params={"index": self.saved}, **self._around(places))
            self.before[at].insert(0, save)
            source = kept
        if len(near) == 1:
            if near[0][1] is not source:
                near[0][1].origin = source
            return
        places = [i for i, _ in near]
        self.before[at].append(Draft("copy", [source], [v for _, v in near], **self._around(places)))

    def _load(self, i: int, use: Value) -> None:
        """Take a tensor from memory: beside the sign of a sum, or else as an operation before its use."""
        step = self.steps[i]
        others = [v for v in step.inputs if v is not use]
        free = step.kind == "binary" and len(others) == 1 and "index" not in step.params
        if free and set(use.axes) <= set(others[0].axes):
            first = step.inputs[0] is use
            step.inputs, step.params = others, {**step.params, "index": self.saved, "first": first}
            return
        # The value that is used becomes what the operation gives: of the tensor itself it is a copy no more.
        use.origin = None
        self._face(i, use)
        stack = tuple(e for e in step.stack if sum(e in s.stack for s in self.steps) > 1)  # no fence round it alone
        made = Draft("load", [], [use], params={"index": self.saved}, stack=stack, times=step.times)
        self.before[i].append(made)

    def _face(self, i: int, made: Value) -> None:
        """Give what comes from memory the order of axes in which it meets the other factor of a product."""
        step = self.steps[i]
        chain = [made]
        if step.kind == "index":
            chain.append(step.outputs[0])
            i = next((k for k, s in enumerate(self.steps) if any(v.root is chain[1] for v in s.inputs)), i)
        step = self.steps[i]
        other = next((v for v in step.inputs if v.root is not chain[-1].root), None)
        if step.kind == "einsum" and other is not None:
            use = next(v for v in step.inputs if v is not other)
            place = {a: -k for k, a in enumerate(other.axes)}
            order = sorted(range(len(use.axes)), key=lambda k: place.get(use.axes[k], 1))
            for value in {id(v): v for v in (*chain[1:], use)}.values():
                value.axes = [value.axes[k] for k in order]
            if len(chain) > 1:
                made.axes = [*(a for a in made.axes if a not in use.axes), *(a for a in use.axes if a in made.axes)]

    def _around(self, places: Sequence[int]) -> dict[str, Any]:
        """Modules that all of some operations are in, and how often what serves them is done."""
        stacks = [self.steps[i].stack if i < len(self.steps) else () for i in places]
        common = []
        for level in zip(*stacks, strict=False):
            if len(set(level)) > 1:
                break
            common.append(level[0])
        inside = [self.steps[i].times for i in places if i < len(self.steps)]
        return {"stack": tuple(common), "times": min(inside, default=1) if common else 1}
