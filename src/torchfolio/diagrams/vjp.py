"""The backward pass of a diagram as a diagram, by the chain rule and a rule for every operation.

The derivative of a map that is woven over an axis is diagonal in that axis, so its rule is woven over it too and costs
no product of the axis with itself. A linear operation gives its transpose: a contraction a contraction with the other
operand, a copy a sum, a sum a copy, a concatenation a split, a convolution a transposed convolution.

Abbott, "Neural Circuit Diagrams", TMLR 2024, section on backpropagation, https://arxiv.org/abs/2402.05424.
"""

from __future__ import annotations

from torchfolio.diagrams.chain import Chain
from torchfolio.diagrams.cotangents import RULES, by_torch
from torchfolio.diagrams.graph import Draft, Graph, Value
from torchfolio.errors import TorchfolioError
from torchfolio.shown import Shown

__all__ = ["Pullback", "pullback"]


class Pullback(Shown):
    """The backward pass of a graph.

    Attributes:
        graph: operations on what is saved and then a cotangent for every output, which give a cotangent for each of
            `inputs` and then for each of `weights`.
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
    return _Backward(forward).run()


class _Backward(Chain):
    """Goes through the operations from the last to the first."""

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

    def _wanted(self, step: Draft) -> bool:
        return any(not v.root.whole for v in step.inputs) or any(self.trains(w) for w in step.weights)

    def _weights(self) -> list[Value]:
        steps = [*self.forward.steps, *self.forward.constants]
        found = {id(w.root): w.root for s in steps for w in s.weights if w.root.learned}
        place = {name: i for i, name in enumerate(self.forward.weights)}
        return sorted(found.values(), key=lambda w: place.get(w.name, 0))

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
