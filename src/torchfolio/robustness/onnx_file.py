"""ONNX networks, in and out, as an `nn.Sequential` of layers whose bounds are known.

What is read is what ONNX means, or it is refused by name: constants broadcast over the network's values as NumPy arrays do,
operators on constants alone are folded, and attributes that are not read here are refused. A file may come from anywhere:
its numbers lie in the file itself, and a network of more than `LARGEST` values a layer is not built. Needs the extra `verify`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.errors import TorchfolioError
from torchfolio.robustness.bounds import AFFINE, ElementwiseAffine, _flat, _is
from torchfolio.robustness.vnnlib import FormatError

__all__ = ["read_onnx", "write_onnx"]

LARGEST = 2**26
"""Values of one input of a layer, at most."""
FLOATS = {1: torch.float32, 11: torch.float64}
"""ONNX element types that networks compute in."""
TYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}
"""ONNX element types of constants."""
ATTRIBUTES: dict[str, set[str]] = {
    "Relu": set(), "Sigmoid": set(), "Tanh": set(), "Identity": set(), "Add": set(), "Sub": set(), "Mul": set(),
    "Div": set(), "Neg": set(), "MatMul": set(), "Dropout": {"ratio", "seed"}, "Flatten": {"axis"},
    "Reshape": {"allowzero"}, "Transpose": {"perm"}, "Squeeze": {"axes"}, "Unsqueeze": {"axes"},
    "Cast": {"to", "saturate"}, "Constant": {"value", "value_float", "value_floats", "value_int", "value_ints"},
    "Gemm": {"alpha", "beta", "transA", "transB"},
    "Conv": {"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"},
    "AveragePool": {"auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides"},
    "MaxPool": {"auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "storage_order", "strides"},
    "BatchNormalization": {"epsilon", "momentum", "spatial", "training_mode"},
}  # fmt: skip
"""What is read: operators, and the attributes of each."""
UNREAD: dict[str, tuple[Any, ...]] = {
    "auto_pad": (b"NOTSET",), "ceil_mode": (0,), "training_mode": (0,), "spatial": (1,), "storage_order": (0,),
    "transA": (0,),
}  # fmt: skip
"""Values of attributes that change nothing; with others the operator is refused."""


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise TorchfolioError('reading and writing ONNX needs onnx: pip install "torchfolio[verify]"') from error
    return onnx


def read_onnx(path: str | Path) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Read a network: layers in evaluation mode, and the shape of one input without its batch axis.

    Known operators of the network's values: Gemm, MatMul, Add, Sub, Mul, Div (by constants), Neg, Conv, Relu, Sigmoid,
    Tanh, Flatten, Reshape (to a flat input), AveragePool, MaxPool, BatchNormalization, Identity, Dropout, Cast (to their
    own type).
    Of constants: Identity, Cast, Transpose, Reshape, Squeeze, Unsqueeze, Neg, Add, Sub, Mul, Div. A network of doubles
    stays one.

    Args:
        path: of the file.

    Returns:
        The layers, and a shape.

    Raises:
        FormatError: if the file is no ONNX network, holds another operator, is no chain of layers, has a batch of another
            size than 1, keeps its numbers elsewhere, or has NaN or infinity among them.
    """
    onnx = _onnx()
    try:
        # Numbers in other files would let a network name any path of the reader's machine.
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # protobuf has errors of its own, and their classes differ between its versions
        raise FormatError(f"{path}: is no ONNX network: {_first(error)}") from None
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or versions[0] < 7:
        raise FormatError(
            f"{path}: expected ONNX operators of set 7 or newer, got {versions[0] if versions else 'none'}"
        )
    if len(model.functions) or len(model.graph.sparse_initializer):
        raise FormatError(f"{path}: functions and sparse constants are not known")
    reader = _Reader(path, onnx, model.graph)
    for number, node in enumerate(model.graph.node):
        reader.add(node, number)
    ends = [o.name for o in model.graph.output]
    if ends != [reader.current]:
        raise FormatError(
            f"{path}: expected one output, that of the last layer {reader.current!r}, got {', '.join(ends) or 'none'}"
        )
    return nn.Sequential(*reader.layers).eval(), reader.shape


def _first(error: Exception) -> str:
    """The first line of what another package says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _Reader:
    """Turns nodes into layers one after the other, and folds those of constants alone."""

    def __init__(self, path: str | Path, onnx: Any, graph: Any) -> None:
        self.path, self.onnx = path, onnx
        self.constants: dict[str, np.ndarray] = {}
        self.layers: list[nn.Module] = []
        self.place = "the constants"
        for tensor in graph.initializer:
            self._keep(tensor.name, self._array(tensor, f"constant {tensor.name!r}"))
        sources = [i for i in graph.input if i.name not in self.constants]
        if len(sources) != 1:
            raise FormatError(f"{path}: expected one input, got {len(sources)}")
        self.current = sources[0].name
        self.seen = {self.current}
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
        self.sizes: tuple[int, ...] = (1, *self.shape)  # of the values behind the last layer

    def _refuse(self, text: str) -> FormatError:
        return FormatError(f"{self.path}: {self.place}: {text}")

    def _keep(self, name: str, value: np.ndarray) -> None:
        if name in self.constants:
            raise self._refuse(f"the name {name!r} is given twice")
        if value.dtype.kind == "f" and not (value.size and np.isfinite(value).all()):
            raise self._refuse(f"{name!r} holds NaN or infinity" if value.size else f"{name!r} is empty")
        self.constants[name] = value

    def _array(self, tensor: Any, name: str) -> np.ndarray:
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raise self._refuse(f"{name} lies in another file, which is not opened")
        if tensor.data_type not in TYPES:
            raise self._refuse(f"{name} has element type {tensor.data_type}, which is not known")
        try:
            return np.array(self.onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise self._refuse(f"{name} cannot be read: {_first(error)}") from None

    def add(self, node: Any, number: int) -> None:
        """One node: folded if it reads constants alone, else the next layer."""
        self.place = f"node {number} ({node.op_type})"
        if node.domain not in ("", "ai.onnx") or node.op_type not in ATTRIBUTES:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise self._refuse(f"the operator {operator} is not known; known: {', '.join(sorted(ATTRIBUTES))}")
        attributes = self._attributes(node)
        names = list(node.input)
        outputs = [name for name in node.output if name]
        if len(outputs) != 1 or outputs[0] in self.seen or outputs[0] in self.constants:
            raise self._refuse(f"expected one output of a new name, got {', '.join(outputs) or 'none'}")
        self.seen.add(outputs[0])
        if self.current not in names and all(n in self.constants or not n for n in names):
            self._keep(outputs[0], self._folded(node.op_type, attributes, [self.constants.get(n) for n in names]))
            return
        strange = [n for n in names if n and n != self.current and n not in self.constants]
        if names.count(self.current) != 1 or strange:
            raise self._refuse(f"expected a chain of layers, this one reads {', '.join(names)}")
        layer = self._layer(node.op_type, attributes, [self.constants.get(n) for n in names], names.index(self.current))
        self._append(layer)
        self.current = outputs[0]

    def _attributes(self, node: Any) -> dict[str, Any]:
        """Attributes, none of which changes what an operator does in a way that is not read here."""
        attributes = {}
        for a in node.attribute:
            if a.name not in ATTRIBUTES[node.op_type]:
                raise self._refuse(f"the attribute {a.name} is not known")
            if (
                a.type in (a.TENSOR, a.GRAPH, a.SPARSE_TENSOR, a.TENSORS, a.GRAPHS, a.SPARSE_TENSORS)
                and a.name != "value"
            ):
                raise self._refuse(f"{a.name} has an unexpected type")
            try:
                attributes[a.name] = self.onnx.helper.get_attribute_value(a)
            except (ValueError, TypeError) as error:
                raise self._refuse(f"the attribute {a.name} cannot be read: {_first(error)}") from None
        for name, allowed in UNREAD.items():
            if name in attributes and attributes[name] not in allowed:
                raise self._refuse(f"{name} {attributes[name]} is not known")
        for name in ("dilations", "strides", "kernel_shape", "pads", "axes", "perm", "value_ints"):
            value = attributes.get(name, [])
            if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
                raise self._refuse(f"expected integers in {name}, got {value!r}")
        for name in ("axis", "group", "to", "transB", "allowzero", "count_include_pad", "value_int"):
            if not isinstance(attributes.get(name, 0), int):
                raise self._refuse(f"expected an integer for {name}, got {attributes[name]!r}")
        for name in ("alpha", "beta", "epsilon", "value_float"):
            if not isinstance(attributes.get(name, 0.0), float) or not math.isfinite(attributes.get(name, 0.0)):
                raise self._refuse(f"expected a finite number for {name}, got {attributes[name]!r}")
        return attributes

    # Constants

    def _folded(self, kind: str, attributes: dict[str, Any], given: list[np.ndarray | None]) -> np.ndarray:
        """What an operator makes of constants."""
        if kind == "Constant":
            return self._constant(attributes)
        if not given or given[0] is None:
            raise self._refuse("reads nothing")
        first = given[0]
        try:
            # An overflow shows as infinity, which is refused where the constant is kept.
            with np.errstate(all="ignore"):
                if kind in ("Add", "Sub", "Mul", "Div"):
                    return self._arithmetic(kind, given)
                if kind == "Identity":
                    return first
                if kind == "Neg":
                    return -first
                if kind == "Cast":
                    return self._cast(first, attributes)
                if kind == "Transpose":
                    return first.transpose(attributes.get("perm") or None)
                if kind == "Reshape":
                    return first.reshape(self._target(first, given, attributes))
                if kind in ("Squeeze", "Unsqueeze"):
                    return self._squeezed(kind, first, given, attributes)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise self._refuse(f"does not fit constants of {first.shape}: {_first(error)}") from None
        raise self._refuse("is not known of constants alone")

    def _constant(self, attributes: dict[str, Any]) -> np.ndarray:
        if len(attributes) != 1:
            raise self._refuse(f"expected one value, got {', '.join(attributes) or 'none'}")
        ((name, value),) = attributes.items()
        if name == "value":
            if not isinstance(value, self.onnx.TensorProto):
                raise self._refuse("expected a tensor as its value")
            return self._array(value, "its value")
        return np.array(value, dtype=np.int64 if "int" in name else np.float32)

    def _arithmetic(self, kind: str, given: list[np.ndarray | None]) -> np.ndarray:
        a, b = given if len(given) == 2 else (None, None)
        if a is None or b is None or a.dtype != b.dtype or a.dtype.kind != "f":
            raise self._refuse("expected two constants of one floating type")
        if math.prod(np.broadcast_shapes(a.shape, b.shape)) > LARGEST:
            raise self._refuse(f"constants of {a.shape} and {b.shape} make more than {LARGEST} values")
        forms = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
        return np.asarray(forms[kind](a, b), dtype=a.dtype)

    def _cast(self, value: np.ndarray, attributes: dict[str, Any]) -> np.ndarray:
        kind = TYPES.get(attributes.get("to", 0))
        if kind is None:
            raise self._refuse(f"element type {attributes.get('to')} is not known")
        if np.issubdtype(kind, np.integer) and value.size and np.abs(value.astype(np.float64)).max() >= 2**31:
            raise self._refuse("its values do not fit integers")
        return value.astype(kind)

    def _target(self, value: np.ndarray, given: list[np.ndarray | None], attributes: dict[str, Any]) -> list[int]:
        target = self._integers(given)
        if attributes.get("allowzero", 0):
            return target
        return [value.shape[i] if size == 0 else size for i, size in enumerate(target)]

    def _integers(self, given: list[np.ndarray | None]) -> list[int]:
        """The second input: integers on one axis."""
        value = given[1] if len(given) == 2 else None
        if value is None or value.dtype.kind != "i" or value.ndim != 1 or len(value) > 16:
            raise self._refuse("expected constant integers, on one axis, as its second input")
        return [int(v) for v in value]

    def _squeezed(
        self, kind: str, value: np.ndarray, given: list[np.ndarray | None], attributes: dict[str, Any]
    ) -> np.ndarray:
        axes = attributes["axes"] if "axes" in attributes else self._integers(given) if len(given) > 1 else None
        if kind == "Squeeze":
            return value.squeeze(None if axes is None else tuple(axes))
        if axes is None:
            raise self._refuse("expected axes")
        return np.expand_dims(value, tuple(axes))

    # Layers

    def _layer(self, kind: str, attributes: dict[str, Any], given: list[np.ndarray | None], place: int) -> nn.Module:
        simple: dict[str, Callable[[], nn.Module]] = {
            "Relu": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "Identity": nn.Identity,
        }  # fmt: skip
        try:
            if kind in ("Add", "Sub", "Mul", "Div"):
                return self._elementwise(kind, given, place)
            if place != 0:
                raise self._refuse("expected the network's values as the first input")
            if kind in simple:
                return simple[kind]()
            if kind == "Neg":
                return ElementwiseAffine(-self._one(), 0 * self._one())
            known = {
                "Flatten": self._flatten, "Reshape": self._flatten, "MatMul": self._linear, "Gemm": self._linear,
                "Conv": self._conv, "AveragePool": self._pool, "MaxPool": self._max_pool,
                "BatchNormalization": self._norm, "Dropout": self._dropout, "Cast": self._same,
            }  # fmt: skip
            if kind not in known:
                raise self._refuse("is known of constants only, got the network's values")
            return known[kind](attributes, given)
        except FormatError:
            raise
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError, OverflowError) as error:
            raise self._refuse(f"does not fit inputs of {self.sizes}: {_first(error)}") from None

    def _append(self, layer: nn.Module) -> None:
        """Take a layer, and follow the shapes."""
        broken = [n for n, t in layer.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:
            raise self._refuse(f"its {broken[0]} is NaN or infinity in {str(self.dtype)[6:]}")
        # By arithmetic: a layer that is too large is never run.
        shape = self._after(layer)
        if min(shape) < 1 or math.prod(shape) > LARGEST:
            raise self._refuse(f"expected 1 to {LARGEST} values of inputs {self.sizes}, got {shape}")
        self.sizes = shape
        self.layers.append(layer.to(self.dtype))

    def _after(self, layer: nn.Module) -> tuple[int, ...]:
        """The shape of one input behind a layer."""
        if isinstance(layer, nn.Flatten):
            return (1, math.prod(self.sizes))
        if isinstance(layer, ElementwiseAffine):
            return tuple(torch.broadcast_shapes(self.sizes, layer.scale.shape, layer.shift.shape))
        if isinstance(layer, nn.Linear):
            if layer.in_features != self.sizes[-1]:
                raise self._refuse(f"a matrix for {layer.in_features} values does not fit inputs of {self.sizes}")
            return (*self.sizes[:-1], layer.out_features)
        if not isinstance(layer, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d):
            return self.sizes
        kernel, stride, padding = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
        dilation = [1, 1] if isinstance(layer, nn.AvgPool2d) else _pair(layer.dilation)
        channels = layer.out_channels if isinstance(layer, nn.Conv2d) else self.sizes[1]
        sides = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(self.sizes[2:], kernel, stride, padding, dilation, strict=True)
        ]
        return (1, channels, *sides)

    def _one(self) -> Tensor:
        return torch.ones((), dtype=self.dtype)

    def _tensor(self, value: np.ndarray | None, what: str) -> Tensor:
        """A constant of the network's own type."""
        if value is None:
            raise self._refuse(f"expected {what} that is constant")
        tensor = torch.from_numpy(np.array(value))
        if tensor.dtype != self.dtype:
            raise self._refuse(f"expected {what} of {str(self.dtype)[6:]}, as the network's values, got {value.dtype}")
        return tensor

    def _elementwise(self, kind: str, given: list[np.ndarray | None], place: int) -> nn.Module:
        if len(given) != 2:
            raise self._refuse(f"expected two inputs, got {len(given)}")
        constant = self._tensor(given[1 - place], "another input")
        shape = self._broadcast(constant)
        last = self.layers[-1] if self.layers else None
        width = self.sizes[-1]
        if (
            kind == "Add" and isinstance(last, nn.Linear) and last.bias is None
            and constant.numel() == width == (constant.shape[-1] if constant.dim() else 1)
        ):  # fmt: skip
            # Along the last axis alone: the bias of the layer before.
            last.bias = nn.Parameter(constant.reshape(width).clone())
            return nn.Identity()
        if (kind, place) == ("Div", 1):
            raise self._refuse("a division by the network's values is not linear")
        one, none = self._one(), 0 * self._one()
        forms = {
            ("Add", 0): (one, constant), ("Add", 1): (one, constant), ("Sub", 0): (one, -constant),
            ("Sub", 1): (-one, constant), ("Mul", 0): (constant, none), ("Mul", 1): (constant, none),
            ("Div", 0): (1 / constant, none),
        }  # fmt: skip
        scale, shift = forms[kind, place]
        if shape != self.sizes:
            # The values themselves are repeated; bounds see that by the scale.
            scale = scale.expand(shape).clone()
        return ElementwiseAffine(scale, shift)

    def _broadcast(self, constant: Tensor) -> torch.Size:
        """The shape with a constant, which must leave the batch axis alone."""
        text = f"a constant of {tuple(constant.shape)} over inputs of {self.sizes}"
        try:
            shape = torch.broadcast_shapes(self.sizes, constant.shape)
        except RuntimeError:
            raise self._refuse(f"{text} does not fit") from None
        if len(shape) != len(self.sizes) or shape[0] != 1:
            raise self._refuse(f"{text} changes the batch axis")
        if shape.numel() > LARGEST:
            raise self._refuse(f"{text} makes more than {LARGEST} values")
        return shape

    def _linear(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        gemm = "Gemm" in self.place
        if len(given) not in ((2, 3) if gemm else (2,)):
            raise self._refuse(f"expected two inputs, got {len(given)}")
        weight = self._tensor(given[1], "a matrix")
        if weight.dim() != 2 or (gemm and len(self.sizes) != 2):
            raise self._refuse(f"expected a matrix, got {tuple(weight.shape)} for inputs of {self.sizes}")
        weight = float(attributes.get("alpha", 1.0)) * (weight if attributes.get("transB", 0) else weight.T)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=self.dtype)
        layer.weight = nn.Parameter(weight.clone())
        if len(given) > 2 and given[2] is not None:
            bias = self._tensor(given[2], "a bias")
            if bias.dim() > 2 or (bias.dim() == 2 and len(bias) != 1):
                raise self._refuse(f"a bias of {tuple(bias.shape)} changes the batch axis")
            layer.bias = nn.Parameter(float(attributes.get("beta", 1.0)) * bias.expand(1, len(weight))[0])
        return layer

    def _flatten(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        if "Reshape" not in self.place:
            if attributes.get("axis", 1) not in (1, 1 - len(self.sizes)):
                raise self._refuse(f"axis {attributes['axis']} is not known")
            return nn.Flatten()
        target, size = self._integers(given), math.prod(self.sizes)
        zero = [] if attributes.get("allowzero", 0) else [0]
        if len(target) != 2 or target[0] not in (1, -1, *zero) or target[1] not in (-1, size) or target == [-1, -1]:
            raise self._refuse(f"expected to flatten each input of {self.sizes}, got {target}")
        return nn.Flatten()

    def _dropout(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        training = given[2] if len(given) > 2 else None
        if training is not None and training.any():
            raise self._refuse("training_mode 1 is not known")
        return nn.Identity()

    def _same(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        if FLOATS.get(attributes.get("to", 0)) != self.dtype:
            raise self._refuse(
                f"the network's values stay {str(self.dtype)[6:]}, got element type {attributes.get('to')}"
            )
        return nn.Identity()

    def _conv(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        weight = self._tensor(given[1] if len(given) in (2, 3) else None, "a kernel")
        bias = self._tensor(given[2], "a bias") if len(given) > 2 and given[2] is not None else None
        if weight.dim() != 4 or len(self.sizes) != 4:
            raise self._refuse(f"expected two spatial axes, got {tuple(weight.shape)} over {self.sizes}")
        size = (weight.shape[2], weight.shape[3])
        groups = attributes.get("group", 1)
        if (
            tuple(attributes.get("kernel_shape", size)) != size
            or groups < 1
            or weight.shape[1] * groups != self.sizes[1]
        ):
            raise self._refuse(
                f"expected a kernel for {self.sizes[1]} channels, got {tuple(weight.shape)}, group {groups}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise self._refuse(f"expected a bias of {len(weight)}, got {tuple(bias.shape)}")
        layer = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], size, self._pair(attributes, "strides"), self._padding(attributes),
            self._pair(attributes, "dilations"), groups, bias is not None, dtype=self.dtype,
        )  # fmt: skip
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer

    def _pool(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        if any(d != 1 for d in attributes.get("dilations", ())):
            raise self._refuse(f"dilations {attributes['dilations']} is not known")
        kernel, stride, padding = self._windows(attributes, given)
        return nn.AvgPool2d(
            kernel, stride, padding, count_include_pad=bool(attributes.get("count_include_pad", 0))
        )  # fmt: skip

    def _max_pool(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        return nn.MaxPool2d(*self._windows(attributes, given), dilation=self._pair(attributes, "dilations"))

    def _windows(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> tuple[tuple[int, int], ...]:
        """Kernel, strides and padding of a pool."""
        if len(self.sizes) != 4 or len(given) != 1:
            raise self._refuse(f"expected two spatial axes, got inputs of {self.sizes}")
        if "kernel_shape" not in attributes:
            raise self._refuse("expected kernel_shape")
        kernel, padding = self._pair(attributes, "kernel_shape"), self._padding(attributes)
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            raise self._refuse(f"expected padding of at most half the kernel {kernel}, got {padding}")
        return kernel, self._pair(attributes, "strides"), padding

    def _pair(self, attributes: dict[str, Any], name: str) -> tuple[int, int]:
        value = attributes.get(name, [1, 1])
        if len(value) != 2 or min(value) < 1 or max(value) > LARGEST:
            raise self._refuse(f"expected two positive integers for {name}, got {value}")
        return value[0], value[1]

    def _padding(self, attributes: dict[str, Any]) -> tuple[int, int]:
        pads = attributes.get("pads", [0, 0, 0, 0])
        if len(pads) != 4 or pads[:2] != pads[2:]:
            raise self._refuse(f"expected the same padding on both sides, got {pads}")
        if min(pads) < 0 or max(pads) > LARGEST:
            raise self._refuse(f"expected padding of at least 0, got {pads}")
        return pads[0], pads[1]

    def _norm(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        if len(given) != 5:
            raise self._refuse(f"expected five inputs, got {len(given)}")
        scale, bias, mean, var = (self._tensor(t, "statistics") for t in given[1:])
        channels = (self.sizes[1],)
        if not all(t.shape == channels for t in (scale, bias, mean, var)):
            raise self._refuse(f"expected statistics of {channels[0]} channels, got {tuple(scale.shape)}")
        factor = scale * torch.rsqrt(var + attributes.get("epsilon", float(np.float32(1e-5))))
        wide = (1, -1, *[1] * (len(self.sizes) - 2))
        return ElementwiseAffine(factor.view(wide), (bias - mean * factor).view(wide))


def write_onnx(model: nn.Module, path: str | Path, shape: Sequence[int]) -> Path:
    """Write a (nested) `nn.Sequential` of known layers for one input `[1, *shape]` named `X`, output `Y`.

    Networks of doubles are written as such, all others in float32.

    Raises:
        TypeError: on a layer without an operator here.
    """
    onnx = _onnx()
    helper = onnx.helper
    nodes, constants = [], []
    double = any(t.dtype == torch.float64 for t in model.state_dict().values())
    dtype = torch.float64 if double else torch.float32

    def constant(name: str, value: Tensor) -> str:
        constants.append(onnx.numpy_helper.from_array(value.detach().cpu().to(dtype).contiguous().numpy(), name))
        return name

    x, current = torch.zeros(1, *shape, dtype=dtype), "X"
    for k, layer in enumerate(_flat(model)):
        if isinstance(layer, nn.Identity | nn.Dropout):
            continue
        operator, inputs, attributes = _operator(layer, f"l{k}", constant)
        nodes.append(helper.make_node(operator, [current, *inputs], [f"t{k}"], **attributes))
        current = f"t{k}"
        with torch.no_grad():
            x = copy.deepcopy(layer).to(dtype).cpu().eval()(x)
    nodes.append(helper.make_node("Identity", [current], ["Y"]))
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT, [1, *size])
        for name, size in (("X", shape), ("Y", x.shape[1:]))
    ]
    graph = helper.make_graph(nodes, "network", [ends[0]], [ends[1]], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made)
    onnx.save(made, str(path))
    return Path(path)


def _operator(layer: nn.Module, name: str, constant: Any) -> tuple[str, list[str], dict[str, Any]]:
    """ONNX operator of a layer, its constants and attributes."""
    simple = {nn.ReLU: "Relu", nn.Sigmoid: "Sigmoid", nn.Tanh: "Tanh"}
    if type(layer) in simple:
        return simple[type(layer)], [], {}
    if _is(layer, (nn.MaxPool2d,)):
        return "MaxPool", [], _max_pool(layer)
    if not _is(layer, AFFINE):
        raise TypeError(f"{type(layer).__name__} cannot be written to ONNX here")
    if isinstance(layer, nn.Flatten):
        if (layer.start_dim, layer.end_dim) != (1, -1):
            raise TypeError(f"expected nn.Flatten(1, -1) to write it to ONNX, got {layer}")
        return "Flatten", [], {"axis": 1}
    if isinstance(layer, nn.Linear):
        bias = layer.bias if layer.bias is not None else torch.zeros(layer.out_features)
        return "Gemm", [constant(f"{name}.weight", layer.weight), constant(f"{name}.bias", bias)], {"transB": 1}
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise TypeError("expected a convolution with numbers for its padding, of zeros, to write it to ONNX")
        inputs = [constant(f"{name}.weight", layer.weight)]
        inputs += [constant(f"{name}.bias", layer.bias)] if layer.bias is not None else []
        return "Conv", inputs, {
            "kernel_shape": list(layer.kernel_size), "strides": list(layer.stride), "dilations": list(layer.dilation),
            "pads": [*layer.padding, *layer.padding], "group": layer.groups,
        }  # fmt: skip
    if isinstance(layer, nn.AvgPool2d):
        if layer.ceil_mode or layer.divisor_override is not None:
            raise TypeError(f"expected a pool without ceil_mode and divisor_override to write it to ONNX, got {layer}")
        kernel, stride, padding = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
        return "AveragePool", [], {
            "kernel_shape": kernel, "strides": stride, "pads": padding * 2, "count_include_pad": int(layer.count_include_pad),
        }  # fmt: skip
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.running_mean is None or layer.running_var is None:
            raise TypeError("expected a batch norm with running statistics to write it to ONNX")
        ones = torch.ones(layer.num_features)
        values = {
            "scale": ones if layer.weight is None else layer.weight, "shift": 0 * ones if layer.bias is None else layer.bias,
            "mean": layer.running_mean, "var": layer.running_var,
        }  # fmt: skip
        return "BatchNormalization", [constant(f"{name}.{k}", v) for k, v in values.items()], {"epsilon": layer.eps}
    raise TypeError(f"{type(layer).__name__} cannot be written to ONNX here")


def _max_pool(layer: Any) -> dict[str, Any]:
    if layer.ceil_mode or layer.return_indices:
        raise TypeError(f"expected a pool without ceil_mode and return_indices to write it to ONNX, got {layer}")
    kernel, stride, padding = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
    return {"kernel_shape": kernel, "strides": stride, "pads": padding * 2, "dilations": _pair(layer.dilation)}


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)] * 2
