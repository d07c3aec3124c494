"""Expressions on named axes: how they are composed, and what each of them is: a module, a graph, Python, a drawing."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from torchfolio.diagrams.assembly import assemble
from torchfolio.diagrams.compile import function_of, source_of
from torchfolio.diagrams.drawing import BackwardDrawing, Drawing
from torchfolio.diagrams.equality import same_graph
from torchfolio.diagrams.graph import Graph, Value
from torchfolio.shown import Shown

__all__ = ["Axes", "Building", "Expression", "SignatureError", "Tuple", "agree", "parse_signature", "written"]

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


def agree(sizes: dict[str, int], name: str, size: int) -> None:
    """Give an axis a size.

    Raises:
        SignatureError: if it has another.
    """
    if sizes.setdefault(name, size) != size:
        raise SignatureError(f"the axis {name} has the sizes {sizes[name]} and {size}")


class Building(Shown):
    """The graph of an expression while it is made: an axis for every name.

    Args:
        whole: the expression, whose parameters are named as they are in it.
        sizes: lengths of axes by name.
    """

    def __init__(self, whole: Expression, sizes: Mapping[str, int]) -> None:
        self.graph = Graph()
        self.graph.named = True
        self.sizes, self.axes = dict(sizes), dict[str, int]()
        self.paths = {id(p): n for n, p in whole.named_parameters()}
        self.graph.weights |= dict(whole.named_parameters())
        self.graph.saved = set(self.graph.weights)
        self.roots: dict[str, Value] = {}

    def size(self, name: str, size: int) -> None:
        """Give an axis the size that a weight has."""
        agree(self.sizes, name, size)
        self.graph.stated.add(self.axis(name))

    def axis(self, name: str) -> int:
        """The axis of a name."""
        if name not in self.axes:
            self.axes[name] = self.graph.axis(name, self.sizes.get(name, UNKNOWN))
        return self.axes[name]

    def product(self, axes: Axes) -> int:
        """The axis over several others."""
        if len(axes) == 1:
            return self.axis(axes[0])
        made = self.graph.axis("", math.prod(self.sizes.get(a, UNKNOWN) for a in axes))
        if axes:
            self.graph.factors[made] = [self.axis(a) for a in axes]
        return made

    def tensor(self, axes: Axes) -> Value:
        """A new tensor."""
        return Value([self.axis(a) for a in axes])

    def weight(self, parameter: nn.Parameter, axes: Axes | None = None) -> Value:
        """One use of a weight."""
        name = self.paths[id(parameter)]
        own = [self.axis(a) for a in axes] if axes is not None else [self.graph.axis("", s) for s in parameter.shape]
        root = self.roots.setdefault(name, Value(list(own), None, name, parameter.requires_grad))
        return Value(own, root)

    def add(self, kind: str, inputs: Sequence[Value], axes: Axes, core: Sequence[str] = (), **more: Any) -> Value:
        """An operation with one result."""
        return self.graph.add(kind, inputs, [self.tensor(axes)], [self.axis(a) for a in core], **more)


UNKNOWN = 2
"""Length of an axis whose length nobody has said; nothing that is written depends on it."""


class Expression(nn.Module, ABC):
    """A diagram: an ordinary module on tensors whose axes have names. Parameters of its parts are its own."""

    inputs: Tuple

    @abstractmethod
    def results(self, inputs: Tuple) -> Tuple:
        """Axes of the results on inputs of given axes, which may be more than the operation is about."""

    @abstractmethod
    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        """Put its operations on tensors of given axes into a graph."""

    @property
    def outputs(self) -> Tuple:
        """Axes of the results."""
        return self.results(self.inputs)

    def signature(self) -> str:
        """`"y k h, x k h -> y x h"`."""
        return written(self.inputs, self.outputs)

    def graph(self, **sizes: int) -> Graph:
        """The operations, with the sizes of axes where they are known.

        Raises:
            SignatureError: if an axis has two sizes.
        """
        return self._built(sizes).graph

    def _built(self, sizes: Mapping[str, int]) -> Building:
        b = Building(self, sizes)
        b.graph.inputs = [b.tensor(axes) for axes in self.inputs]
        b.graph.outputs = self.build(b, self.inputs, [Value(list(v.axes), v) for v in b.graph.inputs])
        b.graph.size = [b.sizes.get(n, z) if n else z for n, z in zip(b.graph.name, b.graph.size, strict=True)]
        b.graph.settle()
        return b

    def forward(self, *tensors: Tensor) -> Any:
        if len(tensors) != len(self.inputs):
            raise SignatureError(f"expected {len(self.inputs)} tensors for {self.signature()}, got {len(tensors)}")
        self.bind(tensors)
        if "_running" not in self.__dict__:
            graph = self.graph()
            text = source_of(graph, "diagram", self.signature())
            names = [n for n in graph.weights if f"weights[{n!r}]" in text]
            self._running = function_of(text, "diagram", graph.functions), names
        function, names = self._running
        return function(*tensors, **({"weights": {n: attrgetter(n)(self) for n in names}} if names else {}))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_running"}

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
                agree(sizes, name, size)
        return sizes

    def __matmul__(self, other: Expression) -> Expression:
        return Sequence_(self, other)

    def __mul__(self, other: Expression) -> Expression:
        return Parallel(self, other)

    def __rshift__(self, axes: str) -> Expression:
        return Woven(self, tuple(axes.split()))

    def to_source(self, name: str = "diagram") -> str:
        """The same as Python on torch, a statement for each operation.

        Where it has weights, the function takes them by name: `diagram(x, weights=net.state_dict())`.

        Raises:
            SignatureError: if an elementwise function is not one of torch.
        """
        graph = self.graph()
        if graph.functions:
            raise SignatureError(
                f"only functions of torch can be written out, got {next(iter(graph.functions.values()))!r}"
            )
        return source_of(graph, name, self.signature())

    def equals(self, other: Expression) -> bool:
        """Whether both are the same diagram, whatever its axes are called.

        How it is bracketed does not matter, nor in which order independent operations and the tensors between them come.
        """
        return same_graph(self.graph(), other.graph())

    def drawing(self, **sizes: int) -> Drawing:
        """The drawing, with the sizes of the axes.

        Raises:
            SignatureError: if an axis has no size, or two.
        """
        b = self._built(sizes)
        missing = [a for a in b.axes if a not in b.sizes]
        if missing:
            raise SignatureError(f"the axis {missing[0]} has no size; give it: drawing({missing[0]}=...)")
        return Drawing(assemble(b.graph, self.signature()), graph=b.graph)

    def backward(self, **sizes: int) -> BackwardDrawing:
        """The backward pass by the rules of the operations, as a drawing that runs without autograd."""
        return self.drawing(**sizes).backward()


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

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        return self.second.build(b, self.first.results(inputs), self.first.build(b, inputs, tensors))


class Parallel(Expression):
    """Two expressions beside each other."""

    def __init__(self, upper: Expression, lower: Expression) -> None:
        super().__init__()
        self.upper, self.lower = upper, lower
        self.inputs = (*upper.inputs, *lower.inputs)

    def _check(self, inputs: Tuple) -> int:
        if len(inputs) != len(self.inputs):
            raise SignatureError(f"{self.signature()} takes {len(self.inputs)} tensors, got {len(inputs)}")
        return len(self.upper.inputs)

    def results(self, inputs: Tuple) -> Tuple:
        count = self._check(inputs)
        return (*self.upper.results(inputs[:count]), *self.lower.results(inputs[count:]))

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        count = self._check(inputs)
        above = self.upper.build(b, inputs[:count], tensors[:count])
        return [*above, *self.lower.build(b, inputs[count:], tensors[count:])]


class Woven(Expression):
    """An expression, broadcast over further axes, which come first in every tensor."""

    def __init__(self, inner: Expression, axes: Axes) -> None:
        super().__init__()
        self.inner, self.axes = inner, axes
        self.inputs = tuple((*axes, *own) for own in inner.inputs)
        self.results(self.inputs)

    def results(self, inputs: Tuple) -> Tuple:
        return self.inner.results(inputs)

    def build(self, b: Building, inputs: Tuple, tensors: Sequence[Value]) -> list[Value]:
        return self.inner.build(b, inputs, tensors)
