"""Constants of an ONNX graph: read from the file, and folded where operators are applied to them alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from torchfolio.errors import TorchfolioError
from torchfolio.robustness.vnnlib import FormatError
from torchfolio.shown import Shown

__all__ = ["ATTRIBUTES", "LARGEST", "Constants", "first_line", "onnx_package"]

LARGEST = 2**26
"""Values of one input of a layer, at most."""
TYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}
"""ONNX element types of constants."""
ATTRIBUTES: dict[str, set[str]] = {
    "Relu": set(), "Sigmoid": set(), "Tanh": set(), "Identity": set(), "Add": set(), "Sub": set(), "Mul": set(),
    "Div": set(), "Neg": set(), "MatMul": set(), "Dropout": {"ratio", "seed"}, "Flatten": {"axis"},
    "Reshape": {"allowzero"}, "Transpose": {"perm"}, "Squeeze": {"axes"}, "Unsqueeze": {"axes"},
    "Concat": {"axis"}, "Gather": {"axis"}, "Shape": set(), "Sqrt": set(),
    "Cast": {"to", "saturate"}, "Constant": {"value", "value_float", "value_floats", "value_int", "value_ints"},
    "Gemm": {"alpha", "beta", "transA", "transB"}, "GlobalAveragePool": set(),
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


def onnx_package() -> Any:
    """The package, imported where it is needed."""
    try:
        import onnx
    except ImportError as error:
        raise TorchfolioError('reading and writing ONNX needs onnx: pip install "torchfolio[verify]"') from error
    return onnx


def first_line(error: Exception) -> str:
    """The first line of what another package says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Constants(Shown):
    """Constants by name, and what operators make of them.

    Args:
        path: path of the file, for messages.
        onnx: package.
    """

    def __init__(self, path: str | Path, onnx: Any) -> None:
        self.path, self.onnx = path, onnx
        self.constants: dict[str, np.ndarray] = {}
        self.place = "the constants"

    def refuse(self, text: str) -> FormatError:
        """An error that names the file and the node."""
        return FormatError(f"{self.path}: {self.place}: {text}")

    def keep(self, name: str, value: np.ndarray) -> None:
        """Take a constant that is finite and of a new name."""
        if name in self.constants:
            raise self.refuse(f"the name {name!r} is given twice")
        if value.dtype.kind == "f" and not (value.size and np.isfinite(value).all()):
            raise self.refuse(f"{name!r} holds NaN or infinity" if value.size else f"{name!r} is empty")
        self.constants[name] = value

    def array(self, tensor: Any, name: str) -> np.ndarray:
        """The numbers of a tensor of the file."""
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            raise self.refuse(f"{name} lies in another file, which is not opened")
        if tensor.data_type not in TYPES:
            raise self.refuse(f"{name} has element type {tensor.data_type}, which is not known")
        try:
            return np.array(self.onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise self.refuse(f"{name} cannot be read: {first_line(error)}") from None

    def attributes(self, node: Any) -> dict[str, Any]:
        """Attributes, none of which changes what an operator does in a way that is not read here."""
        attributes = {}
        for a in node.attribute:
            if a.name not in ATTRIBUTES[node.op_type]:
                raise self.refuse(f"the attribute {a.name} is not known")
            if (
                a.type in (a.TENSOR, a.GRAPH, a.SPARSE_TENSOR, a.TENSORS, a.GRAPHS, a.SPARSE_TENSORS)
                and a.name != "value"
            ):
                raise self.refuse(f"{a.name} has an unexpected type")
            try:
                attributes[a.name] = self.onnx.helper.get_attribute_value(a)
            except (ValueError, TypeError) as error:
                raise self.refuse(f"the attribute {a.name} cannot be read: {first_line(error)}") from None
        for name, allowed in UNREAD.items():
            if name in attributes and attributes[name] not in allowed:
                raise self.refuse(f"{name} {attributes[name]} is not known")
        for name in ("dilations", "strides", "kernel_shape", "pads", "axes", "perm", "value_ints"):
            value = attributes.get(name, [])
            if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
                raise self.refuse(f"expected integers in {name}, got {value!r}")
        for name in ("axis", "group", "to", "transB", "allowzero", "count_include_pad", "value_int"):
            if not isinstance(attributes.get(name, 0), int):
                raise self.refuse(f"expected an integer for {name}, got {attributes[name]!r}")
        for name in ("alpha", "beta", "epsilon", "value_float"):
            if not isinstance(attributes.get(name, 0.0), float) or not math.isfinite(attributes.get(name, 0.0)):
                raise self.refuse(f"expected a finite number for {name}, got {attributes[name]!r}")
        return attributes

    def folded(self, kind: str, attributes: dict[str, Any], given: list[np.ndarray | None]) -> np.ndarray:
        """What an operator makes of constants."""
        if kind == "Constant":
            return self._constant(attributes)
        if not given or given[0] is None:
            raise self.refuse("reads nothing")
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
                if kind == "Sqrt":
                    return np.sqrt(first)
                if kind == "Shape":
                    return np.array(first.shape, np.int64)
                if kind == "Concat":
                    return self._joined(given, attributes)
                if kind == "Gather":
                    return self._picked(first, given, attributes)
                if kind == "Transpose":
                    return first.transpose(attributes.get("perm") or None)
                if kind == "Reshape":
                    return first.reshape(self._target(first, given, attributes))
                if kind in ("Squeeze", "Unsqueeze"):
                    return self._squeezed(kind, first, given, attributes)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise self.refuse(f"does not fit constants of {first.shape}: {first_line(error)}") from None
        raise self.refuse("is not known of constants alone")

    def _constant(self, attributes: dict[str, Any]) -> np.ndarray:
        if len(attributes) != 1:
            raise self.refuse(f"expected one value, got {', '.join(attributes) or 'none'}")
        ((name, value),) = attributes.items()
        if name == "value":
            if not isinstance(value, self.onnx.TensorProto):
                raise self.refuse("expected a tensor as its value")
            return self.array(value, "its value")
        return np.array(value, dtype=np.int64 if "int" in name else np.float32)

    def _arithmetic(self, kind: str, given: list[np.ndarray | None]) -> np.ndarray:
        a, b = given if len(given) == 2 else (None, None)
        if a is None or b is None or a.dtype != b.dtype or a.dtype.kind != "f":
            raise self.refuse("expected two constants of one floating type")
        if math.prod(np.broadcast_shapes(a.shape, b.shape)) > LARGEST:
            raise self.refuse(f"constants of {a.shape} and {b.shape} make more than {LARGEST} values")
        forms = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
        return np.asarray(forms[kind](a, b), dtype=a.dtype)

    def _joined(self, given: list[np.ndarray | None], attributes: dict[str, Any]) -> np.ndarray:
        parts = [part for part in given if part is not None]
        if "axis" not in attributes or len(parts) < len(given) or len({part.dtype for part in parts}) != 1:
            raise self.refuse("expected an axis and constants of one type")
        if sum(part.size for part in parts) > LARGEST:
            raise self.refuse(f"makes more than {LARGEST} values")
        return np.concatenate(parts, attributes["axis"])

    def _picked(self, value: np.ndarray, given: list[np.ndarray | None], attributes: dict[str, Any]) -> np.ndarray:
        places, axis = given[1] if len(given) == 2 else None, attributes.get("axis", 0)
        if places is None or places.dtype.kind != "i" or not -value.ndim <= axis < value.ndim:
            raise self.refuse("expected constant integers and an axis of what they are places in")
        if places.size * (value.size // max(value.shape[axis], 1)) > LARGEST:
            raise self.refuse(f"makes more than {LARGEST} values")
        return np.asarray(np.take(value, places, axis))

    def _cast(self, value: np.ndarray, attributes: dict[str, Any]) -> np.ndarray:
        kind = TYPES.get(attributes.get("to", 0))
        if kind is None:
            raise self.refuse(f"element type {attributes.get('to')} is not known")
        if np.issubdtype(kind, np.integer) and value.size and np.abs(value.astype(np.float64)).max() >= 2**31:
            raise self.refuse("its values do not fit integers")
        return value.astype(kind)

    def _target(self, value: np.ndarray, given: list[np.ndarray | None], attributes: dict[str, Any]) -> list[int]:
        target = self.integers(given)
        if attributes.get("allowzero", 0):
            return target
        return [value.shape[i] if size == 0 else size for i, size in enumerate(target)]

    def integers(self, given: list[np.ndarray | None]) -> list[int]:
        """The second input: integers on one axis."""
        value = given[1] if len(given) == 2 else None
        if value is None or value.dtype.kind != "i" or value.ndim != 1 or len(value) > 16:
            raise self.refuse("expected constant integers, on one axis, as its second input")
        return [int(v) for v in value]

    def _squeezed(
        self, kind: str, value: np.ndarray, given: list[np.ndarray | None], attributes: dict[str, Any]
    ) -> np.ndarray:
        axes = attributes["axes"] if "axes" in attributes else self.integers(given) if len(given) > 1 else None
        if kind == "Squeeze":
            return value.squeeze(None if axes is None else tuple(axes))
        if axes is None:
            raise self.refuse("expected axes")
        return np.expand_dims(value, tuple(axes))
