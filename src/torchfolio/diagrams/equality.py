"""Whether two diagrams are the same one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence

from torchfolio.diagrams.graph import Draft, Graph, Value

__all__ = ["same_graph"]

BY_AXES = ("binary", "einsum", "linear", "reduce", "softmax", "transpose")
"""Operations that their axes say; how they are written besides does not matter."""

TOLD = ("what", "dim", "expand", "transposed", "window", "groups", "other")
"""What a pictogram is told that makes another operation of it."""


def same_graph(one: Graph, other: Graph) -> bool:
    """Whether two graphs do the same operations on the same axes of the same tensors.

    It does not matter what axes, tensors and weights are called, in which order independent operations come, or which of
    two summands or factors comes first. Weights must have the same shapes and be shared alike, not have the same entries.
    """
    return _Shape(one).key() == _Shape(other).key()


class _Shape:
    """A graph without names: every tensor is what it was computed from."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.steps = {id(o): (s, i) for s in (*graph.steps, *graph.constants) for i, o in enumerate(s.outputs)}
        self.known: dict[int, str] = {}
        self.inputs = {id(v): i for i, v in enumerate(graph.inputs)}
        self.weights: dict[int, Hashable] = {}

    def key(self) -> Hashable:
        """What two graphs have in common if and only if they are the same."""
        graph = self.graph
        for step in (*graph.constants, *graph.steps):  # before what uses them, so that no recursion is deep
            for output in step.outputs:
                self.tensor(output)
        outputs = tuple(self.tensor(v) for v in graph.outputs)
        facing = tuple(self.letters([*graph.inputs, *graph.outputs]))
        return facing, outputs, frozenset(Counter(self.weights.values()).items())

    def tensor(self, value: Value) -> str:
        """What a tensor was computed from, as a digest."""
        root = value.root
        if id(root) not in self.known:
            if id(root) in self.inputs:
                key: Hashable = ("input", self.inputs[id(root)])
            elif id(root) in self.steps:
                step, place = self.steps[id(root)]
                key = (self.operation(step), place)
            else:
                weight = self.graph.weights.get(root.name)
                key = ("weight", None if weight is None else tuple(weight.shape))
                self.weights[id(root)] = key
            self.known[id(root)] = _digest(key)
        return self.known[id(root)]

    def operation(self, step: Draft) -> Hashable:
        taken = [self.tensor(v) for v in step.inputs]
        order = list(range(len(taken)))
        if step.kind == "binary" and step.params.get("what") in ("add", "mul") and not step.params.get("other"):
            order.sort(key=lambda i: taken[i])
        inputs = [step.inputs[i] for i in order]
        told = tuple((k, str(step.params[k])) for k in TOLD if step.params.get(k))
        code = "" if step.kind in BY_AXES and not step.params.get("other") else step.code
        pattern = tuple(self.letters([*inputs, *step.outputs, *step.weights], step))
        weights = tuple(self.tensor(w) for w in step.weights)
        return (step.kind, told, code, tuple(taken[i] for i in order), weights, pattern)

    def letters(self, values: Sequence[Value], step: Draft | None = None) -> list[tuple[int, ...]]:
        """Axes as numbers, in the order in which they appear; which of them an operation is about."""
        seen: dict[int, int] = {}
        found = [tuple(seen.setdefault(self.graph.find(a), len(seen)) for a in v.axes) for v in values]
        if step is not None:
            found.append(tuple(sorted(seen[a] for a in {self.graph.find(x) for x in step.core} if a in seen)))
        return found


def _digest(key: Hashable) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:24]
