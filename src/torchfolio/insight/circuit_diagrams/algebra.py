"""Diagrams from expressions: operations on named axes that are composed, run, priced, written out and drawn.

An operation says which axes it is about. Composed after others it is woven over whatever further axes their results have,
as a wire that passes above or below a pictogram: `op.softmax("x")` after `"y k h, x k h -> y x h"` normalises along x for
every y and h.

    attention = (ncd("y k h, x k h -> y x h") @ op.softmax("x")) * ncd("x k h -> x k h") @ ncd("y x h, x k h -> y k h")
    attention(q, k, v)
    attention.drawing(y=5, x=7, k=8, h=4).svg("attention.svg")

Spaces separate the axes of a tensor, commas the tensors. `a @ b` does a and then b, `a * b` both beside each other,
`a >> "b"` weaves a over one more axis.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchfolio.insight.circuit_diagrams.fonts import name_spans
from torchfolio.insight.circuit_diagrams.sheet import Sheet, Step, Wire
from torchfolio.insight.circuit_diagrams.sheet import Tensor as Drawn

if TYPE_CHECKING:
    from torchfolio.insight.circuit_diagrams.drawing import Drawing

__all__ = ["Expression", "SignatureError", "ncd", "op", "parse_signature"]

Axes = tuple[str, ...]
Tuple = tuple[Axes, ...]


class SignatureError(ValueError):
    """Operations that do not fit each other."""


def parse_signature(text: str) -> tuple[Tuple, Tuple]:
    """`"y k h, x k h -> y x h"` as axes of what goes in and comes out.

    Raises:
        SignatureError: if there is no single arrow, or a name is no name.
    """
    sides = text.split("->")
    if len(sides) != 2:
        raise SignatureError(f"expected a signature such as 'y k, x k -> y x', got {text!r}")
    parsed = tuple(tuple(tuple(part.split()) for part in side.split(",")) for side in sides)
    for name in (a for side in parsed for axes in side for a in axes):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise SignatureError(f"expected names of axes in {text!r}, got {name!r}")
    return parsed[0], parsed[1]


def written(inputs: Tuple, outputs: Tuple) -> str:
    """A signature as text."""
    return f"{', '.join(map(' '.join, inputs))} -> {', '.join(map(' '.join, outputs))}"


class Expression(nn.Module, ABC):
    """A diagram: an ordinary module on tensors whose axes have names. Parameters of its parts are its own."""

    inputs: Tuple

    @abstractmethod
    def results(self, inputs: Tuple) -> Tuple:
        """Axes of the results on inputs of given axes, which may be more than the operation is about."""

    @abstractmethod
    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The results on tensors of given axes."""

    @abstractmethod
    def steps(self, inputs: Tuple) -> list[tuple[int, Operation, Tuple]]:
        """Operations in order, each with the place of its first tensor among those alive, and the axes it gets."""

    @property
    def outputs(self) -> Tuple:
        """Axes of the results."""
        return self.results(self.inputs)

    def signature(self) -> str:
        """`"y k h, x k h -> y x h"`."""
        return written(self.inputs, self.outputs)

    def forward(self, *tensors: Tensor) -> Any:
        if len(tensors) != len(self.inputs):
            raise SignatureError(f"expected {len(self.inputs)} tensors for {self.signature()}, got {len(tensors)}")
        self.bind(tensors)
        found = self.run(self.inputs, tensors)
        return found[0] if len(found) == 1 else tuple(found)

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Sizes of the axes, of tensors `inputs` describes.

        Raises:
            SignatureError: if a tensor has another number of axes, or an axis two sizes.
        """
        sizes: dict[str, int] = {}
        for axes, tensor in zip(self.inputs, tensors, strict=True):
            if tensor.dim() != len(axes):
                raise SignatureError(f"expected a tensor of axes {' '.join(axes)}, got shape {tuple(tensor.shape)}")
            for name, size in zip(axes, tensor.shape, strict=True):
                if sizes.setdefault(name, size) != size:
                    raise SignatureError(f"the axis {name} has the sizes {sizes[name]} and {size}")
        return sizes

    def __matmul__(self, other: Expression) -> Expression:
        return Sequence_(self, other)

    def __mul__(self, other: Expression) -> Expression:
        return Parallel(self, other)

    def __rshift__(self, axes: str) -> Expression:
        return Woven(self, tuple(axes.split()))

    def to_source(self, name: str = "diagram") -> str:
        """The same as Python on torch, a statement for each operation; weights are arguments by their names."""
        lines, live, made = [], [f"x{i}" for i in range(len(self.inputs))], 0
        weights: dict[str, Tensor] = {}
        arguments = list(live)
        for number, (place, operation, given) in enumerate(self.steps(self.inputs)):
            taken = live[place : place + len(given)]
            results = []
            for _ in operation.results(given):
                results.append(f"t{made}")
                made += 1
            own = {f"{key}{number}": value for key, value in operation.weights().items()}
            weights |= own
            lines.append(f"    {', '.join(results)} = {operation.source(given, taken, list(own))}")
            live[place : place + len(given)] = results
        head = f"def {name}({', '.join([*arguments, *weights])}):"
        return "\n".join(
            ["import torch", "", "", head, f'    """{self.signature()}"""', *lines, f"    return {', '.join(live)}", ""]
        )

    def source_weights(self) -> dict[str, Tensor]:
        """The arguments of `to_source` beside the inputs."""
        found: dict[str, Tensor] = {}
        for number, (_, operation, _) in enumerate(self.steps(self.inputs)):
            found |= {f"{key}{number}": value for key, value in operation.weights().items()}
        return found

    def backward(self) -> Backward:
        """The backward pass by the rules of the operations: what autograd gives, without autograd."""
        return Backward(self)

    def equals(self, other: Expression) -> bool:
        """Whether both are the same operations on the same axes in the same places, however they are bracketed."""
        return self.inputs == other.inputs and self._key() == other._key()

    def _key(self) -> list[Any]:
        return [(place, operation.key(), given) for place, operation, given in self.steps(self.inputs)]

    def drawing(self, **sizes: int) -> Drawing:
        """The drawing, with the sizes of the axes.

        Raises:
            SignatureError: if an axis has no size.
        """
        from torchfolio.insight.circuit_diagrams.drawing import Drawing

        return Drawing(self.sheet(sizes))

    def sheet(self, sizes: Mapping[str, int]) -> Sheet:
        """What the layout works on."""
        counter = iter(range(10**6))

        def tensor(axes: Axes) -> Drawn:
            missing = [a for a in axes if a not in sizes]
            if missing:
                raise SignatureError(f"the axis {missing[0]} has no size; give it: drawing({missing[0]}=...)")
            key = f"t{next(counter)}"
            return Drawn(key, tuple(Wire(f"{key}.{i}", a, name_spans(a), str(sizes[a])) for i, a in enumerate(axes)))

        live = [tensor(axes) for axes in self.inputs]
        levels, columns = [tuple(live)], []
        for index, (place, operation, given) in enumerate(self.steps(self.inputs)):
            taken = tuple(live[place : place + len(given)])
            results = tuple(tensor(axes) for axes in operation.results(given))
            columns.append((operation.step(index, taken, results, given),))
            live[place : place + len(given)] = results
            levels.append(tuple(live))
        return Sheet(tuple(levels), tuple(columns), title=self.signature())


class Operation(Expression):
    """One operation. `core` are the axes that it is about, by input and by output; any further axes are woven over."""

    kind = ""

    def __init__(self, signature: str) -> None:
        super().__init__()
        self.inputs, self.core_outputs = parse_signature(signature)

    def results(self, inputs: Tuple) -> Tuple:
        _fitting(self, inputs)
        if len(self.inputs) == len(self.core_outputs) == 1:
            return (self._in_place(inputs[0]),)
        extra = self._extra(inputs)
        return tuple((*extra, *axes) for axes in self.core_outputs)

    def _extra(self, inputs: Tuple) -> Axes:
        """Axes that are woven over, in the order in which they come."""
        found = dict.fromkeys(
            a for given, core in zip(inputs, self.inputs, strict=True) for a in given if a not in core
        )
        clash = [a for a in found if any(a in axes for axes in (*self.inputs, *self.core_outputs))]
        if clash:
            raise SignatureError(
                f"{written(self.inputs, self.core_outputs)} would be woven over its own axis {clash[0]}"
            )
        return tuple(found)

    def _in_place(self, given: Axes) -> Axes:
        """Axes of one result: the new ones stand where the first of the old ones stood."""
        extra = self._extra((given,))
        core, new = self.inputs[0], self.core_outputs[0]
        if set(core) == set(new):
            order = iter(new)
            return tuple(next(order) if a in core else a for a in given)
        at = next((i for i, a in enumerate(given) if a in core), len(given))
        before = tuple(a for a in given[:at] if a in extra)
        return (*before, *new, *(a for a in extra if a not in before))

    def steps(self, inputs: Tuple) -> list[tuple[int, Operation, Tuple]]:
        _fitting(self, inputs)
        return [(0, self, inputs)]

    def weights(self) -> dict[str, Tensor]:
        """Weights by short names."""
        return {}

    @abstractmethod
    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Cotangents of the inputs and of the weights, from those of the results.

        A map that is woven over an axis has a derivative that is diagonal in it: the rule is woven over it too, and
        costs no product of that axis with itself.
        """

    def key(self) -> tuple[Any, ...]:
        """What makes it this operation."""
        return (self.kind, self.inputs, self.core_outputs)

    def params(self, inputs: Tuple) -> dict[str, Any]:
        """What the pictogram is told."""
        return {}

    @abstractmethod
    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        """The operation as Python."""

    def step(self, index: int, inputs: tuple[Drawn, ...], outputs: tuple[Drawn, ...], given: Tuple) -> Step:
        free = [w for t in outputs for w in t.wires]
        through = []
        for wire in (w for t in inputs for w in t.wires):
            after = next((w for w in free if w.axis == wire.axis), None)
            if after is not None:
                free.remove(after)
                through.append((wire.key, after.key))
        core = self._core(given)
        learned = bool(self.weights())
        return Step(index, self.kind, inputs, outputs, tuple(through), core, self.params(given), learned, self.kind)

    def _core(self, given: Tuple) -> frozenset[str]:
        ins, outs = ({a for axes in side for a in axes} for side in (self.inputs, self.core_outputs))
        return frozenset(ins ^ outs)


def _fitting(operation: Expression, inputs: Tuple) -> None:
    """Refuse inputs that lack an axis that the operation is about."""
    if len(inputs) != len(operation.inputs):
        raise SignatureError(
            f"{operation.signature()} takes {len(operation.inputs)} tensors, got {len(inputs)}: {', '.join(map(' '.join, inputs))}"
        )
    for given, core in zip(inputs, operation.inputs, strict=True):
        missing = [a for a in core if a not in given]
        if missing:
            raise SignatureError(
                f"expected a tensor of axes {' '.join(core)} for {operation.signature()}, got one of {' '.join(given) or 'none'}, "
                f"which has no {missing[0]}"
            )


class Contraction(Operation):
    """Product of tensors, summed over the axes that do not come out: an einsum; of one tensor, a transpose or a sum."""

    kind = "einsum"

    def __init__(self, signature: str) -> None:
        super().__init__(signature)
        known = {a for axes in self.inputs for a in axes}
        new = [a for axes in self.core_outputs for a in axes if a not in known]
        if len(self.core_outputs) != 1 or new:
            what = f"the new axis {new[0]}" if new else f"{len(self.core_outputs)} results"
            raise SignatureError(f"expected one result of axes that go in, got {what} in {signature!r}")

    def equation(self, inputs: Tuple) -> str:
        """As `torch.einsum` takes it."""
        axes = dict.fromkeys(a for t in inputs for a in t)
        letters = dict(zip(axes, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
        sides = (",".join("".join(letters[a] for a in t) for t in side) for side in (inputs, self.results(inputs)))
        return "->".join(sides)

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.einsum(self.equation(inputs), *tensors)]

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        # The transpose of a contraction is a contraction of the cotangent with the other tensors.
        (made,) = self.results(inputs)
        return [
            _contracted(
                [made, *(a for j, a in enumerate(inputs) if j != i)],
                [cotangents[0], *(t for j, t in enumerate(tensors) if j != i)],
                axes,
                tensors[i],
            )
            for i, axes in enumerate(inputs)
        ], {}

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        return f"torch.einsum({self.equation(inputs)!r}, {', '.join(names)})"

    def step(self, index: int, inputs: tuple[Drawn, ...], outputs: tuple[Drawn, ...], given: Tuple) -> Step:
        made = super().step(index, inputs, outputs, given)
        only, *more = given
        if more:
            return made
        kind = "transpose" if set(only) == set(self.results(given)[0]) else "reduce"
        params = {} if kind == "transpose" else {"what": "sum"}
        return Step(index, kind, inputs, outputs, made.through, made.core, params, False, kind)


class Linear(Operation):
    """A learned linear map of some axes to others, `"m -> k h"`.

    Args:
        signature: of one tensor.
        bias: add a learned constant.
        name: superscript in the drawing.
        **sizes: of all its axes.
    """

    kind = "linear"

    def __init__(self, signature: str, bias: bool = False, name: str = "", **sizes: int) -> None:
        super().__init__(signature)
        if len(self.inputs) != 1 or len(self.core_outputs) != 1:
            raise SignatureError(f"expected a linear map of one tensor, got {signature!r}")
        (core,), (new,) = self.inputs, self.core_outputs
        missing = [a for a in (*core, *new) if a not in sizes]
        if missing:
            raise SignatureError(f"a linear map {signature!r} needs the size of {missing[0]}: {missing[0]}=...")
        if set(core) & set(new):
            raise SignatureError(
                f"expected new axes to come out of {signature!r}, got {(set(core) & set(new)).pop()} again"
            )
        self.label = name
        shape = [sizes[a] for a in (*core, *new)]
        bound = 1 / math.sqrt(math.prod(sizes[a] for a in core) or 1)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros([sizes[a] for a in new])) if bias else None

    def _equation(self, inputs: Tuple) -> str:
        inner = Contraction(
            f"{' '.join(inputs[0])}, {' '.join((*self.inputs[0], *self.core_outputs[0]))} -> {' '.join(self.results(inputs)[0])}"
        )
        return inner.equation((inputs[0], (*self.inputs[0], *self.core_outputs[0])))

    def _bias_shape(self, inputs: Tuple) -> list[int]:
        new = self.core_outputs[0]
        sizes = dict(zip(new, self.weight.shape[len(self.inputs[0]) :], strict=True))
        return [sizes.get(a, 1) for a in self.results(inputs)[0]]

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        made = torch.einsum(self._equation(inputs), tensors[0], self.weight)
        return [made if self.bias is None else made + self.bias.reshape(self._bias_shape(inputs))]

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        (given,), (made,), own = inputs, self.results(inputs), (*self.inputs[0], *self.core_outputs[0])
        back = _contracted([made, own], [cotangents[0], self.weight], given, tensors[0])
        found = {"weight": _contracted([given, made], [tensors[0], cotangents[0]], own, self.weight)}
        if self.bias is not None:
            found["bias"] = _contracted([made], [cotangents[0]], self.core_outputs[0], self.bias)
        return [back], found

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {"weight": self.weight}
        return found if self.bias is None else {**found, "bias": self.bias}

    def key(self) -> tuple[Any, ...]:
        return (*super().key(), self.bias is not None, self.label)

    def params(self, inputs: Tuple) -> dict[str, Any]:
        return {"bias": self.bias is not None, "name": self.label}

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        text = f"torch.einsum({self._equation(inputs)!r}, {names[0]}, {weights[0]})"
        return text if self.bias is None else f"{text} + {weights[1]}.reshape({self._bias_shape(inputs)})"


class SoftMax(Operation):
    """Softmax along one axis, `exp(x) / sum(exp(x))`."""

    kind = "softmax"

    def __init__(self, axis: str) -> None:
        super().__init__(f"{axis} -> {axis}")

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0].softmax(inputs[0].index(self.inputs[0][0]))]

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        # A diagonal, less a product of rank one.
        weighted = results[0] * cotangents[0]
        return [weighted - results[0] * weighted.sum(inputs[0].index(self.inputs[0][0]), keepdim=True)], {}

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        return f"{names[0]}.softmax({inputs[0].index(self.inputs[0][0])})"

    def _core(self, given: Tuple) -> frozenset[str]:
        return frozenset(self.inputs[0])


class Elementwise(Operation):
    """A function of numbers, woven over every axis.

    Args:
        function: its name in `torch`, or a function of tensors (which `to_source` cannot write).
        sign: what stands in the drawing.
    """

    kind = "elementwise"

    def __init__(self, function: str | Callable[[Tensor], Tensor], sign: str = "") -> None:
        super().__init__("->")
        if isinstance(function, str) and not callable(getattr(torch, function, None)):
            raise SignatureError(f"expected the name of a function of torch, got {function!r}")
        self.function, self.sign = function, sign or (function if isinstance(function, str) else "f")

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._applied(tensors[0])]

    def _applied(self, x: Tensor) -> Tensor:
        return getattr(torch, self.function)(x) if isinstance(self.function, str) else self.function(x)

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        slope: Any = torch.func.jvp(self._applied, (tensors[0],), (torch.ones_like(tensors[0]),))[1]
        return [slope * cotangents[0]], {}

    def key(self) -> tuple[Any, ...]:
        return (self.kind, self.function)

    def params(self, inputs: Tuple) -> dict[str, Any]:
        return {"function": self.sign}

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        if not isinstance(self.function, str):
            raise SignatureError(f"only functions of torch can be written out, got {self.function!r}")
        return f"torch.{self.function}({names[0]})"


class Scale(Operation):
    """Multiplication by a number."""

    kind = "elementwise"

    def __init__(self, factor: float) -> None:
        super().__init__("->")
        self.factor = float(factor)

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0] * self.factor]

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return [cotangents[0] * self.factor], {}

    def key(self) -> tuple[Any, ...]:
        return ("scale", self.factor)

    def params(self, inputs: Tuple) -> dict[str, Any]:
        return {"sign": f"∗{self.factor:.3g}"}

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        return f"{names[0]} * {self.factor!r}"


class Binary(Operation):
    """Addition or multiplication element by element; an axis that one tensor lacks is woven over (inner broadcasting)."""

    kind = "binary"

    def __init__(self, what: str) -> None:
        super().__init__(", ->")
        self.what = what

    def results(self, inputs: Tuple) -> Tuple:
        _fitting(self, inputs)
        return (tuple(dict.fromkeys([*inputs[0], *inputs[1]])),)

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        (axes,) = self.results(inputs)
        a, b = (self._aligned(t, own, axes) for t, own in zip(tensors, inputs, strict=True))
        return [a + b if self.what == "add" else a * b]

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        (axes,) = self.results(inputs)
        back = []
        for i, own in enumerate(inputs):
            others, values = [axes], [cotangents[0]]
            if self.what == "mul":
                others, values = [axes, inputs[1 - i]], [cotangents[0], tensors[1 - i]]
            back.append(_contracted(others, values, own, tensors[i]))
        return back, {}

    def _aligned(self, tensor: Tensor, own: Axes, axes: Axes) -> Tensor:
        ordered = tensor.permute([own.index(a) for a in axes if a in own])
        return ordered[tuple(slice(None) if a in own else None for a in axes)]

    def key(self) -> tuple[Any, ...]:
        return (self.kind, self.what)

    def params(self, inputs: Tuple) -> dict[str, Any]:
        return {"what": self.what}

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        (axes,) = self.results(inputs)
        parts = []
        for name, own in zip(names, inputs, strict=True):
            order = [own.index(a) for a in axes if a in own]
            text = name if order == sorted(order) else f"{name}.permute({order})"
            if len(own) < len(axes):
                text += f"[{', '.join(':' if a in own else 'None' for a in axes)}]"
            parts.append(text)
        return f" {'+' if self.what == 'add' else '*'} ".join(parts)


class Copy(Operation):
    """The same tensor several times."""

    kind = "copy"

    def __init__(self, count: int = 2) -> None:
        if count < 2:
            raise SignatureError(f"expected at least two copies, got {count}")
        super().__init__("->" + "," * (count - 1))
        self.count = count

    def results(self, inputs: Tuple) -> Tuple:
        _fitting(self, inputs)
        return (inputs[0],) * self.count

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0]] * self.count

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return [torch.stack(list(cotangents)).sum(0)], {}  # the transpose of a copy is a sum

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        return ", ".join([names[0]] * self.count)

    def step(self, index: int, inputs: tuple[Drawn, ...], outputs: tuple[Drawn, ...], given: Tuple) -> Step:
        made = super().step(index, inputs, outputs, given)
        through = tuple((a.key, b.key) for a, b in zip(inputs[0].wires, outputs[0].wires, strict=True))
        return Step(index, self.kind, inputs, outputs, through, made.core, {}, False, self.kind)


class Identity(Operation):
    """A tensor that passes, to stand beside other operations: `op.identity("x k h")`."""

    kind = "identity"

    def __init__(self, axes: str) -> None:
        super().__init__(f"{axes} -> {axes}")

    def steps(self, inputs: Tuple) -> list[tuple[int, Operation, Tuple]]:
        _fitting(self, inputs)
        return []

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[0]]

    def vjp(
        self, inputs: Tuple, tensors: Sequence[Tensor], results: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return list(cotangents), {}

    def source(self, inputs: Tuple, names: Sequence[str], weights: Sequence[str]) -> str:
        return names[0]


def _contracted(inputs: Sequence[Axes], tensors: Sequence[Tensor], wanted: Axes, like: Tensor) -> Tensor:
    """The product of tensors, summed to the axes `wanted`; over axes that none of them has it is constant."""
    present = tuple(a for a in wanted if any(a in axes for axes in inputs))
    inner = Contraction(written(tuple(inputs), (present,)))
    made = torch.einsum(inner.equation(tuple(inputs)), *tensors)
    return made[tuple(slice(None) if a in present else None for a in wanted)].expand(like.shape)


class Backward:
    """The backward pass of an expression, by the rules of its operations.

    Args:
        expression: whose derivative it is.

    Call it with the inputs and the cotangents of the results: `(cotangents of the inputs, of the weights)`, the latter by
    the names that `source_weights` gives.
    """

    def __init__(self, expression: Expression) -> None:
        self.expression = expression

    @torch.no_grad()
    def __call__(
        self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        self.expression.bind(tensors)
        live, kept = list(tensors), []
        for place, operation, given in self.expression.steps(self.expression.inputs):
            taken = live[place : place + len(given)]
            results = operation.run(given, taken)
            kept.append((place, operation, given, taken, results))
            live[place : place + len(given)] = results
        back, weights = list(cotangents), {}
        if len(back) != len(live):
            raise SignatureError(f"expected cotangents of {len(live)} results, got {len(back)}")
        for number, (place, operation, given, taken, results) in reversed(list(enumerate(kept))):
            found, own = operation.vjp(given, taken, results, back[place : place + len(results)])
            back[place : place + len(results)] = found
            weights |= {f"{key}{number}": value for key, value in own.items()}
        return tuple(back), weights


class Sequence_(Expression):
    """One expression and then another; what the first gives goes into the second, which is woven over further axes."""

    def __init__(self, first: Expression, second: Expression) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.inputs = first.inputs
        try:
            second.results(first.outputs)
        except SignatureError as error:
            raise SignatureError(f"{first.signature()} cannot be followed by {second.signature()}: {error}") from error

    def results(self, inputs: Tuple) -> Tuple:
        return self.second.results(self.first.results(inputs))

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.second.run(self.first.results(inputs), self.first.run(inputs, tensors))

    def steps(self, inputs: Tuple) -> list[tuple[int, Operation, Tuple]]:
        return [*self.first.steps(inputs), *self.second.steps(self.first.results(inputs))]


class Parallel(Expression):
    """Two expressions beside each other."""

    def __init__(self, upper: Expression, lower: Expression) -> None:
        super().__init__()
        self.upper, self.lower = upper, lower
        self.inputs = (*upper.inputs, *lower.inputs)

    def _split(self, inputs: Tuple) -> tuple[Tuple, Tuple]:
        if len(inputs) != len(self.inputs):
            raise SignatureError(f"{self.signature()} takes {len(self.inputs)} tensors, got {len(inputs)}")
        return inputs[: len(self.upper.inputs)], inputs[len(self.upper.inputs) :]

    def results(self, inputs: Tuple) -> Tuple:
        above, below = self._split(inputs)
        return (*self.upper.results(above), *self.lower.results(below))

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        above, below = self._split(inputs)
        return [*self.upper.run(above, tensors[: len(above)]), *self.lower.run(below, tensors[len(above) :])]

    def steps(self, inputs: Tuple) -> list[tuple[int, Operation, Tuple]]:
        above, below = self._split(inputs)
        count = len(self.upper.results(above))
        return [*self.upper.steps(above), *((place + count, o, given) for place, o, given in self.lower.steps(below))]


class Woven(Expression):
    """An expression, broadcast over further axes, which come first in every tensor."""

    def __init__(self, inner: Expression, axes: Axes) -> None:
        super().__init__()
        self.inner, self.axes = inner, axes
        self.inputs = tuple((*axes, *own) for own in inner.inputs)
        self.results(self.inputs)

    def results(self, inputs: Tuple) -> Tuple:
        return self.inner.results(inputs)

    def run(self, inputs: Tuple, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.inner.run(inputs, tensors)

    def steps(self, inputs: Tuple) -> list[tuple[int, Operation, Tuple]]:
        return self.inner.steps(inputs)


def ncd(signature: str) -> Expression:
    """A contraction by its signature: `ncd("y k h, x k h -> y x h")`. Axes that do not come out are summed over."""
    return Contraction(signature)


op = SimpleNamespace(
    linear=Linear,
    softmax=SoftMax,
    elementwise=Elementwise,
    scale=Scale,
    add=lambda: Binary("add"),
    multiply=lambda: Binary("mul"),
    copy=Copy,
    identity=Identity,
)
"""The operations: `linear`, `softmax`, `elementwise`, `scale`, `add`, `multiply`, `copy`, `identity`."""
