"""The backward pass of a diagram as a diagram, by the chain rule and a rule for every operation.

The derivative of a map that is woven over an axis is diagonal in that axis, so its rule is woven over it too and costs
no product of the axis with itself. A linear operation gives its transpose: a contraction a contraction with the other
operand, a copy a sum, a sum a copy, a concatenation a split, a convolution a transposed convolution.

Abbott, "Neural Circuit Diagrams", TMLR 2024, section on backpropagation, https://arxiv.org/abs/2402.05424.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torchfolio.diagrams.cotangents import RULES, by_torch
from torchfolio.diagrams.graph import Draft, Graph, Value
from torchfolio.errors import TorchfolioError
from torchfolio.shown import Shown

__all__ = ["Chain", "Pullback", "pullback"]


class Pullback(Shown):
    """The backward pass of a graph.

    Attributes:
        graph: takes what is saved and then a cotangent for every output; gives a cotangent for each of `inputs` and then
            for each of `weights`.
        saved: tensors of the forward graph that it takes.
        inputs: places of the forward inputs that have a cotangent: those of floating point that the outputs depend on.
        weights: names of the weights that have one.
    """

    def __init__(self, graph: Graph, saved: list[Value], inputs: list[int], weights: list[str]) -> None:
        self.graph, self.saved, self.inputs, self.weights = graph, saved, inputs, weights


def pullback(forward: Graph) -> Pullback:
    """The backward pass of a graph that is settled.

    Raises:
        TorchfolioError: if an operation is random, or cannot be written.
    """
    return Chain(forward).run()


class Chain(Shown):
    """Goes through the operations from the last to the first."""

    def __init__(self, forward: Graph) -> None:
        self.forward = forward
        graph = self.graph = Graph()
        for name in (
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
        ):
            setattr(graph, name, copy.copy(getattr(forward, name)))
        self.cotangents: dict[int, list[Value]] = defaultdict(list)
        self.kept: dict[int, tuple[Value, Value]] = {}
        graph.constants = [s for s in forward.constants if not s.params.get("effect")]
        self.trained = _trained(forward)

    def run(self) -> Pullback:
        forward, graph = self.forward, self.graph
        gradients = []
        for i, value in enumerate(forward.outputs):
            own = Value(
                list(value.axes), None, "gradient" if len(forward.outputs) == 1 else f"gradient{i}", whole=value.whole
            )
            gradients.append(own)
            if not value.root.whole:
                self.push(value, own)
        for step in reversed(forward.alive()):
            found = [self.total(o) for o in step.outputs]
            if any(g is not None for g in found) and self._wanted(step):
                graph._stack = step.stack
                self._pull(step, found)
        graph._stack = ()
        inputs = [i for i, v in enumerate(forward.inputs) if not v.whole and id(v) in self.cotangents]
        graph.outputs = [v for i in inputs if (v := self.total(forward.inputs[i])) is not None]
        for step in reversed(forward.constants):
            found = [self.total(o) for o in step.outputs]
            if any(g is not None for g in found) and any(self.trains(w) for w in step.weights):
                by_torch(self, step, found)
        weights: dict[str, Value] = {}
        for value in self._weights():
            total = self.total(value)
            if total is not None:
                weights[value.name] = total
        graph.outputs += weights.values()
        self._keep_lengths()
        order = {id(v): i for i, v in enumerate([*forward.inputs, *(o for s in forward.steps for o in s.outputs)])}
        kept = sorted(self.kept.values(), key=lambda pair: order[id(pair[0])])
        for i, (origin, own) in enumerate(kept):
            own.name = origin.name or f"saved{i}"
        graph.inputs = [*(own for _, own in kept), *gradients]
        graph.settle(apart=True)
        return Pullback(graph, [origin for origin, _ in kept], inputs, list(weights))

    def trains(self, weight: Value) -> bool:
        """Whether a weight is trained, or is a constant that depends on one that is."""
        return weight.root.learned or id(weight.root) in self.trained

    def _wanted(self, step: Draft) -> bool:
        return any(not v.root.whole for v in step.inputs) or any(self.trains(w) for w in step.weights)

    def _weights(self) -> list[Value]:
        steps = [*self.forward.steps, *self.forward.constants]
        found = {id(w.root): w.root for s in steps for w in s.weights if w.root.learned}
        place = {name: i for i, name in enumerate(self.forward.weights)}
        return sorted(found.values(), key=lambda w: place.get(w.name, 0))

    # -- tensors

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
            kind = "einsum" if len(operands) > 1 or not others else "reduce"
            if kind == "einsum" and len(operands) == 1:
                kind = "transpose"
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

    def _keep_lengths(self) -> None:
        """Keep a tensor of the forward pass for every length that nothing else says."""
        graph, forward = self.graph, self.forward
        wanted: list[int] = []
        symbols = {str(s): a for a, s in reversed(forward.symbols.items()) if s.is_Symbol}
        for step in [*graph.steps, *graph.constants]:
            wanted += [a for a in step.sizes if isinstance(a, int)]
            formulas = [a for a in step.sizes if not isinstance(a, int)]
            wanted += [symbols[str(s)] for f in formulas for s in f.free_symbols if str(s) in symbols]
            if step.kind in ("view", "reshape") and not step.code:
                wanted += [a for o in step.outputs for a in o.axes]
        holders: dict[int, Value] = {}
        for value in [*forward.inputs, *(o for s in forward.steps for o in s.outputs)]:
            for axis in value.axes:
                holders.setdefault(graph.find(axis), value)
        members = graph.members()
        given = {a for v in [own for _, own in self.kept.values()] + forward.outputs for a in self.find(v.axes)}

        def look(axis: int, depth: int = 0) -> None:
            root = graph.find(axis)
            if root in given or graph.size[axis] == 1 or any(m in graph.stated for m in members[root]) or depth > 8:
                return
            if root in graph.factors:
                for factor in graph.factors[root]:
                    look(factor, depth + 1)
                return
            older = [graph.twins[m] for m in members[root] if m in graph.twins and graph.find(graph.twins[m]) < root]
            if older:
                look(older[0], depth + 1)
            elif root in holders:
                self.saved(holders[root])
                given.update(self.find(holders[root].axes))

        for axis in wanted:
            look(axis)

    # -- operations

    def _pull(self, step: Draft, found: list[Value | None]) -> None:
        if step.params.get("random"):
            raise TorchfolioError(
                f"{step.params.get('sign', step.kind)} is random, so a backward pass apart from its forward pass is not "
                "that of anything; draw the module in evaluation mode"
            )
        axes = [[self.graph.find(a) for a in v.axes] for v in (*step.inputs, *step.outputs)]
        twice = any(len(set(own)) < len(own) for own in axes)
        rule = None if twice or None in found else RULES.get(step.kind)
        if rule is None or rule(self, step, [g for g in found if g is not None]) is False:
            by_torch(self, step, found)


def _trained(forward: Graph) -> set[int]:
    """Constants that depend on weights that are trained."""
    found: set[int] = set()
    for step in forward.constants:
        if any(w.root.learned or id(w.root) in found for w in step.weights):
            found |= {id(o) for o in step.outputs}
    return found
