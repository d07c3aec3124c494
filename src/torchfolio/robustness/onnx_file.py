"""ONNX networks, in and out, as an `nn.Sequential` of layers whose bounds are known.

What is read is what ONNX means, or it is refused by name: constants broadcast over the network's values as NumPy arrays do,
operators on constants alone are folded, and attributes that are not read here are refused. Two paths may meet in a sum, as
in residual networks. A file may come from anywhere: its numbers lie in the file itself, and a network of more than `LARGEST`
values a layer is not built. Needs the extra `verify`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchfolio.robustness.affine_layers import ElementwiseAffine, Residual
from torchfolio.robustness.onnx_constants import ATTRIBUTES, LARGEST, first_line, onnx_package
from torchfolio.robustness.onnx_layers import FLOATS, LayerReader
from torchfolio.robustness.onnx_write import write_onnx
from torchfolio.robustness.vnnlib import FormatError

__all__ = ["read_onnx", "write_onnx"]

COPIES = 4
"""How often a layer may be computed again, on average, where paths cross."""
NESTED = 50
"""Sums within a path of a sum, at most."""


def read_onnx(path: str | Path) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Read a network: layers in evaluation mode, and the shape of one input without its batch axis.

    Known operators of the network's values: Gemm, MatMul, Add, Sub, Mul, Div (by constants), sums and differences of two
    paths, Neg, Conv, Relu, Sigmoid, Tanh, Flatten, Reshape, AveragePool, GlobalAveragePool, MaxPool, BatchNormalization,
    Identity, Dropout, Cast (to their own type).
    Of constants: Identity, Cast, Transpose, Reshape, Squeeze, Unsqueeze, Concat, Gather, Shape (of the network's values, too),
    Sqrt, Neg, Add, Sub, Mul, Div. A network of doubles stays one.

    A sum of two paths becomes a `torchfolio.robustness.affine_layers.Residual` from the place where they part. Where paths cross,
    a layer that lies on several is computed on each.

    Args:
        path: path of the file.

    Returns:
        The layers, and a shape.

    Raises:
        FormatError: if the file is no ONNX network, holds another operator, has more than one input or output, a batch of
            another size than 1, keeps its numbers elsewhere, or has NaN or infinity among them.
    """
    onnx = onnx_package()
    try:
        # Numbers in other files would let a network name any path of the reader's machine.
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # protobuf has errors of its own, and their classes differ between its versions
        raise FormatError(f"{path}: is no ONNX network: {first_line(error)}") from None
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or versions[0] < 7:
        raise FormatError(
            f"{path}: expected ONNX operators of set 7 or newer, got {versions[0] if versions else 'none'}"
        )
    if len(model.functions) or len(model.graph.sparse_initializer):
        raise FormatError(f"{path}: functions and sparse constants are not known")
    graph = model.graph
    names = [value.name for value in (*graph.initializer, *graph.input, *graph.output)]
    names += [name for node in graph.node for name in (node.op_type, node.domain, *node.input, *node.output)]
    if not all(isinstance(name, str) for name in names):  # protobuf gives bytes where they are no UTF-8
        raise FormatError(f"{path}: expected names that are text, got bytes that are no UTF-8")
    reader = _Reader(path, onnx, graph)
    for number, node in enumerate(model.graph.node):
        reader.add(node, number)
    return reader.network([o.name for o in model.graph.output])


@dataclass(frozen=True)
class _Values:
    """Values that the network computes.

    Attributes:
        sizes: their shape, with a batch axis of 1.
        layer: layer that computes them; `None` for the input, and for sums.
        sources: names of the values they are computed from: none of the input, one of a layer, two of a sum.
        gate: name of the last values that all paths to them lead through; their own of the input.
        depth: number of such gates before them.
    """

    sizes: tuple[int, ...]
    layer: nn.Module | None
    sources: tuple[str, ...]
    gate: str
    depth: int


class _Reader(LayerReader):
    """The graph: which values come from which."""

    def __init__(self, path: str | Path, onnx: Any, graph: Any) -> None:
        super().__init__(path, onnx)
        for tensor in graph.initializer:
            self.keep(tensor.name, self.array(tensor, f"constant {tensor.name!r}"))
        sources = [i for i in graph.input if i.name not in self.constants]
        if len(sources) != 1:
            raise FormatError(f"{path}: expected one input, got {len(sources)}")
        kind = sources[0].type.tensor_type
        if kind.elem_type not in FLOATS:
            raise FormatError(f"{path}: expected an input of floats or doubles, got element type {kind.elem_type}")
        self.dtype = FLOATS[kind.elem_type]
        dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if len(dims) < 2 or any(d is None or d < 1 for d in dims[1:]):
            raise FormatError(f"{path}: expected an input of a batch axis and of known sizes, got {dims}")
        if dims[0] not in (None, 0, 1):  # old exporters write 0 for a size that is not fixed
            raise FormatError(f"{path}: expected an input with a batch of 1 or of any size, got {dims[0]}")
        self.shape = tuple(d for d in dims[1:] if d is not None)
        if math.prod(self.shape) > LARGEST:
            raise FormatError(f"{path}: an input has {math.prod(self.shape)} values, more than {LARGEST}")
        self.start = sources[0].name
        self.values = {self.start: _Values((1, *self.shape), None, (), self.start, 0)}
        self.count = 0  # of the layers of the network

    def add(self, node: Any, number: int) -> None:
        """One node: folded if it reads constants alone, else a layer or a sum."""
        self.place = f"node {number} ({node.op_type})"
        if node.domain not in ("", "ai.onnx") or node.op_type not in ATTRIBUTES:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise self.refuse(f"the operator {operator} is not known; known: {', '.join(sorted(ATTRIBUTES))}")
        attributes = self.attributes(node)
        names = list(node.input)
        outputs = [name for name in node.output if name]
        if len(outputs) != 1 or outputs[0] in self.values or outputs[0] in self.constants:
            raise self.refuse(f"expected one output of a new name, got {', '.join(outputs) or 'none'}")
        strange = [n for n in names if n and n not in self.values and n not in self.constants]
        if strange:
            raise self.refuse(f"reads {strange[0]}, which nothing before it gives")
        constants = [self.constants.get(n) for n in names]
        computed = [n for n in names if n in self.values]
        if node.op_type == "Shape" and len(computed) == 1:  # sizes are known: those of a batch of one
            self.keep(outputs[0], np.array(self.values[computed[0]].sizes, np.int64))
        elif not computed:
            self.keep(outputs[0], self.folded(node.op_type, attributes, constants))
        elif len(computed) == 1:
            self.values[outputs[0]] = self._behind(
                computed[0], node.op_type, attributes, constants, names.index(computed[0])
            )
        else:
            self.values[outputs[0]] = self._sum(node.op_type, names, outputs[0])

    def _behind(self, source: str, kind: str, attributes: dict[str, Any], given: list[Any], place: int) -> _Values:
        """What a layer makes of values."""
        values = self.values[source]
        self.sizes, self.before = values.sizes, values.layer
        layer = self.layer(kind, attributes, given, place)
        if kind == "Add" and isinstance(layer, nn.Linear):  # the matrix before and this bias in one
            source = values.sources[0]
            self.sizes = self.values[source].sizes
        return _Values(self.checked(layer), layer.to(self.dtype), (source,), source, self.values[source].depth + 1)

    def _sum(self, kind: str, names: list[str], output: str) -> _Values:
        """The sum or difference of two paths."""
        if kind not in ("Add", "Sub") or len(names) != 2:
            raise self.refuse(f"expected to read the network's values once, this one reads {', '.join(names)}")
        sizes = [self.values[n].sizes for n in names]
        if sizes[0] != sizes[1]:
            raise self.refuse(f"expected two paths of one shape, got {sizes[0]} and {sizes[1]}")
        ends = list(names)
        if kind == "Sub":
            minus = ElementwiseAffine(-self._one(), 0 * self._one())
            second = self.values[names[1]]
            ends[1] = f"{output} minus {names[1]}"
            self.values[ends[1]] = _Values(second.sizes, minus, (names[1],), names[1], second.depth + 1)
        gate = self._gate(*ends)
        return _Values(sizes[0], None, (ends[0], ends[1]), gate, self.values[gate].depth + 1)

    def _gate(self, a: str, b: str) -> str:
        """The last values that all paths to either lead through."""
        while a != b:
            if self.values[a].depth < self.values[b].depth:
                a, b = b, a
            a = self.values[a].gate
        return a

    def network(self, ends: list[str]) -> tuple[nn.Sequential, tuple[int, ...]]:
        """The layers from the input to the output, and the shape of an input."""
        if len(ends) != 1 or ends[0] not in self.values or ends[0] == self.start:
            raise FormatError(f"{self.path}: expected one output, computed by a node, got {', '.join(ends) or 'none'}")
        return nn.Sequential(*self._path(ends[0], self.start)).eval(), self.shape

    def _path(self, end: str, start: str, nested: int = 0) -> list[nn.Module]:
        """Layers from one place to another that all paths to it lead through."""
        if nested > NESTED:
            raise FormatError(f"{self.path}: expected at most {NESTED} sums of paths within each other")
        layers: list[nn.Module] = []
        while end != start:
            values = self.values[end]
            self.count += 1
            if self.count > COPIES * len(self.values):
                raise FormatError(f"{self.path}: its paths cross so often that its layers would be computed many times")
            if values.layer is not None:
                layers.append(values.layer)
            else:
                body, shortcut = (nn.Sequential(*self._path(name, values.gate, nested + 1)) for name in values.sources)
                layers.append(Residual(body, shortcut))
            end = values.gate
        return layers[::-1]
