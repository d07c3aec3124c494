"""Diagrams from expressions: operations on named axes that are composed, run, priced, written out and drawn.

An operation says which axes it is about. Composed after others it is woven over whatever further axes their results have,
as a wire that passes above or below a pictogram: `op.softmax("x")` after `"y k h, x k h -> y x h"` normalises along x for
every y and h.

    attention = (ncd("y k h, x k h -> y x h") @ op.softmax("x")) * ncd("x k h -> x k h") @ ncd("y x h, x k h -> y k h")
    attention(q, k, v)
    attention.drawing(y=5, x=7, k=8, h=4).svg("attention.svg")

Spaces separate the axes of a tensor, commas the tensors. `a @ b` does a and then b, `a * b` both beside each other,
`a >> "b"` weaves a over one more axis.

Longer than most because it holds the ten operations, each with its signature, errors and axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from torchfolio.diagrams.expression import (
    Axes,
    Building,
    Expression,
    Parallel,
    Sequence_,
    SignatureError,
    Tuple,
    Woven,
    agree,
    parse_signature,
    written,
)
from torchfolio.diagrams.graph import Value
from torchfolio.diagrams.windows import window_text

__all__ = ["Expression", "Parallel", "Sequence_", "SignatureError", "Woven", "ncd", "op", "parse_signature"]


class Operation(Expression):
    """One operation. Its signature has the axes that it is about; any further axes are woven over."""

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


def _need(sizes: Mapping[str, int], axes: Sequence[str], what: str) -> None:
    """Refuse a learned operation without the size of one of its axes."""
    missing = [a for a in axes if a not in sizes]
    if missing:
        raise SignatureError(f"{what} needs the size of {missing[0]}: {missing[0]}=...")


def _weight(shape: Sequence[int], inputs: int) -> nn.Parameter:
    """A weight of a map of so many inputs, as the layers of PyTorch begin."""
    bound = 1 / math.sqrt(inputs or 1)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Contraction(Operation):
    """Product of tensors, summed over the axes that do not come out: an einsum; of one tensor, a transpose or a sum."""

    def __init__(self, signature: str) -> None:
        super().__init__(signature)
        known = {a for axes in self.inputs for a in axes}
        new = [a for axes in self.core_outputs for a in axes if a not in known]
        if len(self.core_outputs) != 1 or new:
            what = f"the new axis {new[0]}" if new else f"{len(self.core_outputs)} results"
            raise SignatureError(f"expected one result of axes that go in, got {what} in {signature!r}")

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        (made,), first = self.results(inputs), inputs[0]
        if len(inputs) > 1:
            return [b.add("einsum", tensors, made, [a for a in {x: 0 for t in inputs for x in t} if a not in made])]
        kept = tuple(a for a in first if a in made)
        value = tensors[0]
        if kept != first:
            value = b.add("reduce", [value], kept, [a for a in first if a not in made], what="sum")
        return [value if kept == made else b.add("transpose", [value], made)]


class Linear(Operation):
    """A learned linear map of some axes to others, `"m -> k h"`.

    Args:
        signature: axes of one tensor and of its image.
        bias: whether to add a learned constant.
        name: superscript in the drawing.
        **sizes: lengths of all its axes.
    """

    def __init__(self, signature: str, bias: bool = False, name: str = "", **sizes: int) -> None:
        super().__init__(signature)
        if len(self.inputs) != 1 or len(self.core_outputs) != 1:
            raise SignatureError(f"expected a linear map of one tensor, got {signature!r}")
        (core,), (new,) = self.inputs, self.core_outputs
        _need(sizes, (*core, *new), f"a linear map {signature!r}")
        if set(core) & set(new):
            raise SignatureError(
                f"expected new axes to come out of {signature!r}, got {(set(core) & set(new)).pop()} again"
            )
        self.label = name
        shape = [sizes[a] for a in (*core, *new)]
        self.weight = _weight(shape, math.prod(sizes[a] for a in core))
        self.bias = nn.Parameter(torch.zeros([sizes[a] for a in new])) if bias else None

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        (core,), (new,), (made,) = self.inputs, self.core_outputs, self.results(inputs)
        for name, size in zip((*core, *new), self.weight.shape, strict=True):
            b.size(name, size)
        weights = [b.weight(self.weight, (*core, *new)), *([] if self.bias is None else [b.weight(self.bias, new)])]
        return [b.add("linear", tensors, made, (*core, *new), weights=weights, learned=True, bias=self.bias is not None,
                      name=self.label)]  # fmt: skip


class Convolution(Operation):
    """A learned convolution, `"c h w -> n p q"`: channels c to n, and a window that runs along the other axes.

    `y[n, p, q] = sum over c, i, j of W[n, c, i, j] x[c, s p + d i - padding, s q + d j - padding]`, as `torch.nn.Conv2d`.

    Args:
        signature: axes of one tensor and of its image, channels first. An axis along which the window runs may keep its
            name where it keeps its length.
        kernel: sides of the window, one number for all.
        stride: step of the window, as that of `torch.nn.Conv2d`, like the three that follow.
        padding: zeros on every side.
        dilation: distance of the window's entries.
        groups: number of groups of channels that do not mix.
        bias: whether to add a learned constant to each channel.
        transposed: whether it is the transpose of a convolution, as `torch.nn.ConvTranspose2d`.
        **sizes: lengths of the axes of channels.
    """

    def __init__(
        self,
        signature: str,
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = False,
        transposed: bool = False,
        **sizes: int,
    ) -> None:
        super().__init__(signature)
        sides = len(self.inputs[0]) - 1
        if [len(t) for t in (*self.inputs, *self.core_outputs)] != [sides + 1] * 2 or not 1 <= sides <= 3:
            raise SignatureError(
                f"expected channels and one to three further axes, such as 'c h w -> n p q', got {signature!r}"
            )
        (channels, *space), (made, *placed) = self.inputs[0], self.core_outputs[0]
        _need(sizes, (channels, made), f"a convolution {signature!r}")
        every = (kernel, stride, padding, dilation)
        self.kernel, self.stride, self.padding, self.dilation = (
            tuple(v) if isinstance(v, Sequence) else (v,) * sides for v in every
        )
        self.groups, self.transposed = groups, transposed
        for i, (before, after) in enumerate(zip(space, placed, strict=True)):
            if before == after and [self._side(i, n) for n in (100, 101)] != [100, 101]:
                raise SignatureError(f"the axis {before} changes its length in {signature!r}: give it another name")
        one, other = (channels, made) if transposed else (made, channels)
        if sizes[one] % groups or sizes[other] % groups:
            raise SignatureError(f"{groups} groups do not divide {sizes[channels]} and {sizes[made]} channels")
        shape = [sizes[one], sizes[other] // groups, *self.kernel]
        self.weight = _weight(shape, math.prod(shape[1:]))
        self.bias = nn.Parameter(torch.zeros(sizes[made])) if bias else None
        self.sizes = sizes[channels], sizes[made]

    def _side(self, i: int, n: int) -> int:
        """Length of an axis after the window has run along it."""
        reach = self.dilation[i] * (self.kernel[i] - 1)
        if self.transposed:
            return (n - 1) * self.stride[i] - 2 * self.padding[i] + reach + 1
        return (n + 2 * self.padding[i] - reach - 1) // self.stride[i] + 1

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        (core,), (new,), (given,), (made,) = self.inputs, self.core_outputs, inputs, self.results(inputs)
        b.size(core[0], self.sizes[0])
        b.size(new[0], self.sizes[1])
        for i, (before, after) in enumerate(zip(core[1:], new[1:], strict=True)):
            if before in b.sizes and before != after:
                length = self._side(i, b.sizes[before])
                if length < 1:
                    raise SignatureError(
                        f"a window of {self.kernel[i]} does not fit an axis {before} of {b.sizes[before]}"
                    )
                agree(b.sizes, after, length)
        extra = tuple(a for a in given if a not in core)
        value = tensors[0]
        if given != (*extra, *core):
            value = b.add("transpose", [value], (*extra, *core))
        batch = b.product(extra)  # PyTorch wants one axis of examples
        inner, outer = ([batch, *(b.axis(a) for a in axes)] for axes in (core, new))
        if len(extra) != 1:
            value = b.graph.add("reshape" if extra else "view", [value], [Value(inner)], [batch, *map(b.axis, extra)])
        geometry = {"stride": list(self.stride), "padding": list(self.padding), "dilation": list(self.dilation), "groups": self.groups}  # fmt: skip
        bias = "{w1}" if self.bias is not None else "None"
        rest = [[0] * len(self.kernel), self.groups, list(self.dilation)] if self.transposed else [list(self.dilation), self.groups]  # fmt: skip
        rest = ", ".join(map(str, [list(self.stride), list(self.padding), *rest]))
        code = f"F.conv{'_transpose' if self.transposed else ''}{len(self.kernel)}d({{0}}, {{w0}}, {bias}, {rest})"
        spaces = [b.axis(a) for a in (*core[1:], *new[1:])]
        weights = [b.weight(self.weight), *([] if self.bias is None else [b.weight(self.bias)])]
        value = b.graph.add(
            "conv", [value], [Value(outer)], [*inner[1:], *outer[1:]], code=code, weights=weights, learned=True,
            bias=self.bias is not None, spatial=spaces, **window_text(list(self.kernel), geometry, self.transposed),
        )  # fmt: skip
        if len(extra) != 1:
            value = b.graph.add(
                "reshape" if extra else "view", [value], [b.tensor((*extra, *new))], [batch, *map(b.axis, extra)]
            )
        return [value if made == (*extra, *new) else b.add("transpose", [value], made)]


class Concatenation(Operation):
    """Axes of several tensors joined end to end, `"x, y -> z"`; all their other axes must be the same."""

    def __init__(self, signature: str) -> None:
        super().__init__(signature)
        if [len(t) for t in (*self.inputs, *self.core_outputs)] != [1] * (len(self.inputs) + 1) or len(self.inputs) < 2:
            raise SignatureError(
                f"expected an axis of each tensor and one that comes out, such as 'x, y -> z', got {signature!r}"
            )

    def results(self, inputs: Tuple) -> Tuple:
        _fitting(self, inputs)
        self._extra(inputs)
        rest = [set(given) - set(core) for given, core in zip(inputs, self.inputs, strict=True)]
        if any(other != rest[0] for other in rest):
            raise SignatureError(
                f"expected tensors that differ in {written(self.inputs, self.core_outputs)} alone, got {', '.join(map(' '.join, inputs))}"
            )
        return (tuple(self.core_outputs[0][0] if a == self.inputs[0][0] else a for a in inputs[0]),)

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        (made,), ((new,),) = self.results(inputs), self.core_outputs
        known = [b.sizes.get(a) for (a,) in self.inputs]
        if None not in known:
            agree(b.sizes, new, sum(k for k in known if k is not None))
        values = []
        for (core,), given, value in zip(self.inputs, inputs, tensors, strict=True):
            wanted = tuple(core if a == new else a for a in made)
            values.append(value if given == wanted else b.add("transpose", [value], wanted))
        dim = made.index(new)
        code = f"torch.cat([{', '.join(f'{{{i}}}' for i in range(len(values)))}], {dim})"
        return [b.add("concat", values, made, [*(a for (a,) in self.inputs), new], code=code, dim=dim)]


class SoftMax(Operation):
    """Softmax along one axis, `exp(x) / sum(exp(x))`."""

    def __init__(self, axis: str) -> None:
        super().__init__(f"{axis} -> {axis}")

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        return [b.add("softmax", tensors, *self.results(inputs), core=self.inputs[0])]


class Elementwise(Operation):
    """A function of numbers, woven over every axis.

    Args:
        function: its name in `torch`, or a function of tensors (which `to_source` cannot write).
        sign: text that stands in the drawing.
    """

    def __init__(self, function: str | Callable[[Tensor], Tensor], sign: str = "") -> None:
        super().__init__("->")
        if isinstance(function, str) and not callable(getattr(torch, function, None)):
            raise SignatureError(f"expected the name of a function of torch, got {function!r}")
        self.function, self.sign = function, sign or (function if isinstance(function, str) else "f")

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        name = f"torch.{self.function}"
        if not isinstance(self.function, str):
            name = next((k for k, f in b.graph.functions.items() if f is self.function), f"f{len(b.graph.functions)}")
            b.graph.functions[name] = self.function
        return [b.add("elementwise", tensors, inputs[0], code=f"{name}({{0}})", function=self.sign)]


class Scale(Operation):
    """Multiplication by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__("->")
        self.factor = float(factor)

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        sign = f"∗{self.factor:.3g}"
        return [b.add("elementwise", tensors, inputs[0], code=f"{{0}} * {self.factor!r}", sign=sign, linear=True)]


class Binary(Operation):
    """Addition or multiplication element by element; an axis that one tensor lacks is woven over (inner broadcasting)."""

    def __init__(self, what: str) -> None:
        super().__init__(", ->")
        self.what = what

    def results(self, inputs: Tuple) -> Tuple:
        _fitting(self, inputs)
        return (tuple(dict.fromkeys([*inputs[0], *inputs[1]])),)

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        return [b.add("binary", tensors, *self.results(inputs), what=self.what)]


class Copy(Operation):
    """The same tensor several times."""

    def __init__(self, count: int = 2) -> None:
        if count < 2:
            raise SignatureError(f"expected at least two copies, got {count}")
        super().__init__("->" + "," * (count - 1))
        self.count = count

    def results(self, inputs: Tuple) -> Tuple:
        _fitting(self, inputs)
        return (inputs[0],) * self.count

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        return [Value(list(tensors[0].axes), tensors[0]) for _ in range(self.count)]


class Identity(Operation):
    """A tensor that passes, to stand beside other operations: `op.identity("x k h")`."""

    def __init__(self, axes: str) -> None:
        super().__init__(f"{axes} -> {axes}")

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        return list(tensors)


def ncd(signature: str) -> Expression:
    """A contraction by its signature: `ncd("y k h, x k h -> y x h")`. Axes that do not come out are summed over."""
    return Contraction(signature)


op = SimpleNamespace(
    linear=Linear,
    conv=Convolution,
    concat=Concatenation,
    softmax=SoftMax,
    elementwise=Elementwise,
    scale=Scale,
    add=lambda: Binary("add"),
    multiply=lambda: Binary("mul"),
    copy=Copy,
    identity=Identity,
)
"""The operations: `linear`, `conv`, `concat`, `softmax`, `elementwise`, `scale`, `add`, `multiply`, `copy`, `identity`."""
