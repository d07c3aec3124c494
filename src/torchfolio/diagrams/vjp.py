"""The backward pass of a diagram as a diagram, by the chain rule and a rule for every operation.

The derivative of a map that is woven over an axis is diagonal in that axis, so its rule is woven over it too and costs
no product of the axis with itself. A linear operation gives its transpose: a contraction a contraction with the other
operand, a copy a sum, a sum a copy, a concatenation a split, a convolution a transposed convolution.

Abbott, "Neural Circuit Diagrams", TMLR 2024, section on backpropagation, https://arxiv.org/abs/2402.05424.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torchfolio.diagrams.graph import Draft, Graph, Value
from torchfolio.errors import TorchfolioError

__all__ = ["Pullback", "pullback"]


class Pullback:
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
    return _Chain(forward).run()


class _Chain:
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
                _any(self, step, found)
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
            _any(self, step, found)


def _trained(forward: Graph) -> set[int]:
    """Constants that depend on weights that are trained."""
    found: set[int] = set()
    for step in forward.constants:
        if any(w.root.learned or id(w.root) in found for w in step.weights):
            found |= {id(o) for o in step.outputs}
    return found


# --------------------------------------------------------------------------------------------------------------- rules

Rule = Callable[[_Chain, Draft, list[Value]], "bool | None"]
"""Pushes cotangents of what an operation takes; False where it does not know how."""


def _any(c: _Chain, step: Draft, found: list[Value | None]) -> None:
    """The derivative as PyTorch has it for that one operation, as a box."""
    if not step.code:
        raise TorchfolioError(f"there is no rule for the backward pass of {step.kind!r}")
    inputs = [v for v in step.inputs if not v.root.whole]
    weights = [w for w in step.weights if c.trains(w)]
    free = {f"{{{i}}}": f"v{i}" for i, v in enumerate(step.inputs) if not v.root.whole}
    free |= {f"{{w{j}}}": f"u{j}" for j, w in enumerate(step.weights) if any(w is x for x in weights)}
    inner = re.sub(r"\{w?\d+\}", lambda m: free.get(m[0], m[0]), step.pure or step.code)
    given = [(i, g) for i, g in enumerate(found) if g is not None]
    if len(step.outputs) > 1:
        places = ", ".join(f"{inner}[{i}]" for i, _ in given)
        inner = f"({places})" if len(given) > 1 else places
    first = len(step.inputs)
    marks = ", ".join(f"{{{first + k}}}" for k in range(len(given)))
    call = f"(({marks}))" if len(given) > 1 else f"({marks})"
    code = f"torch.func.vjp(lambda {', '.join(free.values())}: {inner}, {', '.join(free)})[1]{call}"
    outputs = [Value(list(x.axes)) for x in (*inputs, *weights)]
    if len(outputs) == 1:
        code += "[0]"
    taken = [c.saved(v) for v in step.inputs] + [c.once(g) for _, g in given]
    core = set(step.core) | {a for w in weights for a in w.axes}
    params = {"text": f"{step.params.get('function') or step.kind}′"}
    c.graph.add(f"{step.kind}′", taken, outputs, core, weights=step.weights, code=code, sizes=step.sizes,
                learned=bool(weights), **params)  # fmt: skip
    for value, made in zip((*inputs, *weights), outputs, strict=True):
        c.push(value, made)


def _einsum(c: _Chain, step: Draft, found: list[Value]) -> None:
    for i, value in enumerate(step.inputs):
        if not value.root.whole:
            others = [c.saved(v) for j, v in enumerate(step.inputs) if j != i]
            c.push(value, c.contract([found[0], *others], value.axes))


def _linear(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    if len(step.inputs) > 1 or len(step.weights) > 1 + bool(step.params.get("bias")):
        return False
    (source,), (made,), (weight, *bias) = step.inputs, found, step.weights
    if len(set(c.find(weight.axes))) < len(weight.axes):
        # A map of an axis to itself, as where a residual connection says that they are one: here they are two.
        if not step.code.startswith("F.linear"):
            return False
        new = c.graph.twin(weight.axes[0])
        made = Value([*made.axes[:-1], new], made)
        weight, bias = Value([new, weight.axes[1]], weight), [Value([new], b) for b in bias]
    core = step.core
    if not source.root.whole:
        back = c.add("linear", [made], source.axes, core, weights=[Value(list(weight.axes), weight)], learned=True,
                     name=f"{step.params.get('name', '')}T")  # fmt: skip
        c.push(source, back)
    if c.trains(weight):
        c.push(weight, c.contract([made, c.saved(source)], weight.axes))
    if bias and c.trains(bias[0]):
        c.push(bias[0], c.contract([made], bias[0].axes))


def _elementwise(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,) = step.inputs, found
    what, same = step.params.get("what"), c.find(source.axes) == c.find(made.axes)
    if len(step.weights) == 1 and what in ("add", "mul"):
        weight = step.weights[0]
        others = [] if what == "add" else [Value(list(weight.axes), weight)]
        if others:
            return False
        c.push(source, c.contract([made], source.axes))
        if c.trains(weight):
            c.push(weight, c.contract([made], weight.axes))
        return None
    if step.weights or not same:
        return False
    if what == "add":  # of a number
        c.push(source, made)
    elif step.params.get("linear"):
        sign = step.params.get("sign", "")
        c.push(
            source, c.add("elementwise", [made], source.axes, sign=sign, code=step.code, sizes=step.sizes, linear=True)
        )
    else:
        inner = step.code.replace("{0}", "v")
        name = f"{step.params.get('function') or step.params.get('sign') or 'f'}′"
        # Diagonal: the slope times the cotangent, which is also the derivative along it.
        code = f"torch.func.jvp(lambda v: {inner}, ({{0}},), ({{1}},))[1]"
        c.push(
            source,
            c.add("binary", [c.saved(source), made], source.axes, what=name, other=True, code=code, sizes=step.sizes),
        )
    return None


def _binary(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    what = step.params.get("what")
    if step.params.get("other") or what not in ("add", "sub", "mul"):
        return False
    (left, right), (made,) = step.inputs, found
    for one, other, second in ((left, right, False), (right, left, True)):
        if one.root.whole:
            continue
        if what == "mul":
            if c.find(one.axes) == c.find(other.axes) == c.find(made.axes):
                back = c.add("binary", [made, c.saved(other)], one.axes, what="mul")
            else:
                back = c.contract([made, c.saved(other)], one.axes)
        else:
            back = c.contract([made], one.axes)
            if what == "sub" and second:
                back = c.add("elementwise", [back], one.axes, sign="neg", code="-{0}", linear=True)
        c.push(one, back)
    return None


def _softmax(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    if step.params.get("other"):
        return False
    (source,), (made,), (result,) = step.inputs, found, step.outputs
    core = c.find(list(step.core))
    # A diagonal, less a product of rank one: p (g - sum p g).
    rest = [a for a in result.axes if c.graph.find(a) not in core]
    mean = c.add("einsum", [made, c.saved(result)], rest, core)
    centred = c.add("binary", [made, mean], result.axes, what="sub")
    c.push(source, c.add("binary", [centred, c.saved(result)], source.axes, what="mul"))
    return None


def _transpose(c: _Chain, step: Draft, found: list[Value]) -> None:
    (source,), (made,) = step.inputs, found
    c.push(source, c.add("transpose", [made], source.axes))


def _reshape(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,) = step.inputs, found
    if step.code:
        return False
    if step.params.get("expand"):
        c.push(source, c.contract([made], source.axes))
    else:
        c.push(source, c.add(step.kind, [made], source.axes, step.core))
    return None


def _concat(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    dim = step.params.get("dim")
    if dim is None or step.weights or any(v.root.whole for v in step.inputs):
        return False
    sizes = [v.axes[dim] for v in step.inputs]
    code = f"torch.split({{0}}, [{', '.join(f'{{s{i}}}' for i in range(len(sizes)))}], {dim})"
    parts = [Value(list(v.axes)) for v in step.inputs]
    c.graph.add("split", [c.once(found[0])], parts, step.core, code=code, sizes=sizes, dim=dim)
    for value, part in zip(step.inputs, parts, strict=True):
        c.push(value, part)
    return None


def _split(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), dim = step.inputs, step.params.get("dim")
    if dim is None:
        return False
    whole = len(found[0].axes) == len(source.axes)
    marks = ", ".join(f"{{{i}}}" for i in range(len(found)))
    code = f"torch.{'cat' if whole else 'stack'}([{marks}], {dim})"
    parts = [Value(list(found[0].axes) if i == 0 else _like(g, found[0], dim, whole), g) for i, g in enumerate(found)]
    c.push(source, c.graph.add("concat", parts, [Value(list(source.axes))], step.core, code=code, dim=dim))
    return None


def _like(value: Value, first: Value, dim: int, whole: bool) -> list[int]:
    """Axes of a part as the first has them, but for the one that is joined."""
    return [a if whole and i == dim else b for i, (a, b) in enumerate(zip(value.axes, first.axes, strict=True))]


def _conv(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,), geometry = step.inputs, found, step.params.get("geometry", {})
    sides = [v for k in ("stride", "padding", "dilation") for v in geometry.get(k, ["?"])]
    if not all(isinstance(s, int) for s in sides) or any(geometry.get("output_padding", [])):
        return False
    weight, *bias = step.weights
    dims, transposed = len(geometry["stride"]), step.params["transposed"]
    how = f"{geometry['stride']}, {geometry['padding']}, {geometry['dilation']}, {geometry['groups']}"
    shared = {k: step.params[k] for k in ("window", "groups", "kernel_text", "note", "spatial") if k in step.params}
    if not source.root.whole:
        if transposed:
            code, sizes = f"F.conv{dims}d({{0}}, {{w0}}, None, {how})", []
        else:
            marks = ", ".join(f"{{s{i}}}" for i in range(len(source.axes)))
            code, sizes = f"torch.nn.grad.conv{dims}d_input([{marks}], {{w0}}, {{0}}, {how})", list(source.axes)
        more = shared | ({"stride_text": step.params["stride_text"]} if "stride_text" in step.params else {})
        back = c.add("conv", [made], source.axes, step.core, weights=[weight], code=code, sizes=sizes, learned=True,
                     transposed=not transposed, bias=False, name="T", **more)  # fmt: skip
        c.push(source, back)
    if c.trains(weight):
        pair = [made, c.saved(source)] if transposed else [c.saved(source), made]
        code = f"torch.nn.grad.conv{dims}d_weight({{0}}, {{w0}}.shape, {{1}}, {how})"
        core = [*step.core, *made.axes, *source.axes, *weight.axes]
        c.push(weight, c.add("conv weight", pair, weight.axes, core, weights=[weight], code=code, text="★ᵀ", **shared))
    if bias and c.trains(bias[0]):
        c.push(bias[0], c.contract([made], [made.axes[1]]))
    return None


def _reduce(c: _Chain, step: Draft, found: list[Value]) -> bool | None:
    (source,), (made,), what = step.inputs, found, step.params.get("what")
    if what not in ("sum", "mean") or step.params.get("other"):
        return False
    if what == "mean":
        core = step.core
        marks = " / ".join(f"{{s{i}}}" for i in range(len(core)))
        code = f"{{0}} / {marks}" if core else "{0}"
        made = c.add("elementwise", [made], made.axes, sign="∗1∕n", code=code, sizes=core, linear=True)
    c.push(source, c.contract([made], source.axes))
    return None


RULES: dict[str, Rule] = {
    "einsum": _einsum, "linear": _linear, "elementwise": _elementwise, "binary": _binary, "softmax": _softmax,
    "transpose": _transpose, "view": _reshape, "reshape": _reshape, "concat": _concat, "split": _split, "conv": _conv,
    "reduce": _reduce,
}  # fmt: skip
