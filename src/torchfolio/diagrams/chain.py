"""The backward pass of a graph while it is made: cotangents of tensors and weights, and what is saved for them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torchfolio.diagrams.graph import Graph, Value
from torchfolio.shown import Shown

__all__ = ["Chain"]

SHARED = (
    "parent",
    "name",
    "size",
    "symbols",
    "factors",
    "cuts",
    "twins",
    "stated",
    "weights",
    "saved",
    "functions",
    "named",
)
"""What the graph of a backward pass has of the forward pass: its axes and weights."""


class Chain(Shown):
    """The graph of a backward pass, to which the rules of operations add.

    Attributes:
        forward: the graph that is differentiated.
        graph: operations of the backward pass so far.
        cotangents: cotangents of the uses of every tensor of `forward`, by its identity.
        kept: tensors of `forward` that the backward pass takes, each with what stands for it there.
        trained: identities of constants that depend on weights that are trained.
    """

    def __init__(self, forward: Graph) -> None:
        self.forward = forward
        self.graph = Graph()
        for name in SHARED:
            setattr(self.graph, name, copy.copy(getattr(forward, name)))
        self.graph.constants = [s for s in forward.constants if not s.params.get("effect")]
        self.cotangents: dict[int, list[Value]] = defaultdict(list)
        self.kept: dict[int, tuple[Value, Value]] = {}
        self.trained = _trained(forward)

    def trains(self, weight: Value) -> bool:
        """Whether a weight is trained, or is a constant that depends on one that is."""
        return weight.root.learned or id(weight.root) in self.trained

    def saved(self, value: Value) -> Value:
        """A tensor of the forward pass, as it is used there."""
        root = value.root
        if id(root) not in self.kept:
            self.kept[id(root)] = root, Value(list(root.axes), None, whole=root.whole)
        return Value(list(value.axes), self.kept[id(root)][1], whole=root.whole)

    def push(self, value: Value, cotangent: Value) -> None:
        """Add to the cotangent of a tensor, or of a weight, that of one use of it."""
        root = value.root
        if not root.whole:
            self.cotangents[id(root)].append(Value(list(root.axes), cotangent))

    def total(self, value: Value) -> Value | None:
        """The cotangent of a tensor: the sum of those of its uses, since a copy's transpose is a sum."""
        parts = self.cotangents.get(id(value.root))
        if not parts:
            return None
        while len(parts) > 1:
            one, other, *rest = parts
            parts = [self.add("binary", [one, other], value.root.axes, what="add"), *rest]
        self.cotangents[id(value.root)] = parts
        return parts[0]

    def add(
        self, kind: str, inputs: Sequence[Value], axes: Sequence[int], core: Iterable[int] = (), **more: Any
    ) -> Value:
        """An operation with one result."""
        return self.graph.add(kind, [self.once(v) for v in inputs], [Value(list(axes))], core, **more)

    def once(self, value: Value) -> Value:
        """A use of a tensor of its own, on the same axes."""
        return Value(list(value.axes), value, whole=value.whole)

    def find(self, axes: Sequence[int]) -> list[int]:
        return [self.graph.find(a) for a in axes]

    def seen(self, axes: Sequence[int]) -> list[int]:
        return [self.graph.find(a) for a in axes if self.graph.size[a] != 1]

    def contract(self, operands: Sequence[Value], axes: Sequence[int]) -> Value:
        """The product of tensors on given axes: summed over others, constant along those that none of them has."""
        have = {a for v in operands for a in self.find(v.axes)}
        present = [a for a in axes if self.graph.find(a) in have and self.graph.size[a] != 1]
        if len(operands) > 1 or self.seen(operands[0].axes) != self.find(present):
            others = [a for v in operands for a in v.axes if self.graph.find(a) not in self.find(present)]
            kind = "einsum" if len(operands) > 1 else "reduce" if others else "transpose"
            one = operands[0].axes
            if kind == "transpose" and len(one) != len(present):  # axes of length one go first
                operands = [self.add("view", operands, [a for a in one if self.graph.size[a] != 1])]
            made = self.add(kind, operands, present, others, **({"what": "sum"} if kind == "reduce" else {}))
        else:
            made = operands[0]
        if self.find(made.axes) == self.find(axes):
            return made
        if len(present) < len(self.seen(axes)):
            ones = [a if a in present else self.graph.axis("", 1) for a in axes]
            made = made if len(ones) == len(made.axes) else self.add("view", [made], ones)
            new = [a for a in axes if self.graph.find(a) not in have]
            return self.add("view", [made], axes, new, expand=True)
        return self.add("view", [made], axes)


def _trained(forward: Graph) -> set[int]:
    """Constants that depend on weights that are trained."""
    found: set[int] = set()
    for step in forward.constants:
        if any(w.root.learned or id(w.root) in found for w in step.weights):
            found |= {id(o) for o in step.outputs}
    return found
