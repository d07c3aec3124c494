"""Operators of an ONNX graph as layers whose bounds are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.robustness.affine_layers import ElementwiseAffine
from torchfolio.robustness.onnx_constants import LARGEST, Constants, first_line
from torchfolio.robustness.pooling_bounds import looks_past
from torchfolio.robustness.vnnlib import FormatError

__all__ = ["FLOATS", "LayerReader", "pair"]

FLOATS = {1: torch.float32, 11: torch.float64}
"""ONNX element types that networks compute in."""


class LayerReader(Constants):
    """Turns a node into a layer.

    Attributes:
        dtype: dtype that the network computes in.
        sizes: sizes of the values that the node reads, with their batch axis of 1.
        before: layer that these values come from; `None` for the input and for sums.
    """

    def __init__(self, path: str | Path, onnx: Any) -> None:
        super().__init__(path, onnx)
        self.dtype = torch.float32
        self.sizes: tuple[int, ...] = ()
        self.before: nn.Module | None = None

    def layer(self, kind: str, attributes: dict[str, Any], given: list[np.ndarray | None], place: int) -> nn.Module:
        simple: dict[str, Callable[[], nn.Module]] = {
            "Relu": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "Identity": nn.Identity,
        }  # fmt: skip
        try:
            if kind in ("Add", "Sub", "Mul", "Div"):
                return self._elementwise(kind, given, place)
            if place != 0:
                raise self.refuse("expected the network's values as the first input")
            if kind in simple:
                return simple[kind]()
            if kind == "GlobalAveragePool":
                if len(self.sizes) != 4:
                    raise self.refuse(f"expected two spatial axes, got inputs of {self.sizes}")
                return nn.AdaptiveAvgPool2d(1)
            if kind == "Neg":
                return ElementwiseAffine(-self._one(), 0 * self._one())
            known = {
                "Flatten": self._flatten, "Reshape": self._flatten, "MatMul": self._linear, "Gemm": self._linear,
                "Conv": self._conv, "AveragePool": self._pool, "MaxPool": self._max_pool,
                "BatchNormalization": self._norm, "Dropout": self._dropout, "Cast": self._same,
            }  # fmt: skip
            if kind not in known:
                raise self.refuse("is known of constants only, got the network's values")
            return known[kind](attributes, given)
        except FormatError:
            raise
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError, OverflowError) as error:
            raise self.refuse(f"does not fit inputs of {self.sizes}: {first_line(error)}") from None

    def checked(self, layer: nn.Module) -> tuple[int, ...]:
        """The shape behind a layer, of which neither the weights nor the sizes are out of bounds."""
        broken = [n for n, t in layer.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:
            raise self.refuse(f"its {broken[0]} is NaN or infinity in {str(self.dtype)[6:]}")
        # By arithmetic: a layer that is too large is never run.
        shape = self._after(layer)
        if min(shape) < 1 or math.prod(shape) > LARGEST:
            raise self.refuse(f"expected 1 to {LARGEST} values of inputs {self.sizes}, got {shape}")
        if isinstance(layer, nn.MaxPool2d) and looks_past(layer, self.sizes[2:]):
            raise self.refuse(f"a window reads nothing of inputs of {self.sizes} but their padding")
        return shape

    def _after(self, layer: nn.Module) -> tuple[int, ...]:
        """The shape of one input behind a layer."""
        if isinstance(layer, nn.Sequential):  # a reshape
            layer = layer[-1]
        if isinstance(layer, nn.Flatten):
            return (1, math.prod(self.sizes))
        if isinstance(layer, ElementwiseAffine):
            return tuple(torch.broadcast_shapes(self.sizes, layer.scale.shape, layer.shift.shape))
        if isinstance(layer, nn.Linear):
            if layer.in_features != self.sizes[-1]:
                raise self.refuse(f"a matrix for {layer.in_features} values does not fit inputs of {self.sizes}")
            return (*self.sizes[:-1], layer.out_features)
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return (*self.sizes[:2], 1, 1)
        if isinstance(layer, nn.Unflatten):
            return (1, *map(int, layer.unflattened_size))
        if not isinstance(layer, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d):
            return self.sizes
        kernel, stride, padding = (pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
        dilation = [1, 1] if isinstance(layer, nn.AvgPool2d) else pair(layer.dilation)
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
            raise self.refuse(f"expected {what} that is constant")
        tensor = torch.from_numpy(np.array(value))
        if tensor.dtype != self.dtype:
            raise self.refuse(f"expected {what} of {str(self.dtype)[6:]}, as the network's values, got {value.dtype}")
        return tensor

    def _elementwise(self, kind: str, given: list[np.ndarray | None], place: int) -> nn.Module:
        if len(given) != 2:
            raise self.refuse(f"expected two inputs, got {len(given)}")
        constant = self._tensor(given[1 - place], "another input")
        shape = self._broadcast(constant)
        last, width = self.before, self.sizes[-1]
        if (
            kind == "Add" and isinstance(last, nn.Linear) and last.bias is None
            and constant.numel() == width == (constant.shape[-1] if constant.dim() else 1)
        ):  # fmt: skip
            # Along the last axis alone: the bias of the layer before, whose place the new one takes.
            layer = nn.Linear(last.in_features, width, dtype=self.dtype)
            layer.weight, layer.bias = last.weight, nn.Parameter(constant.reshape(width).clone())
            return layer
        if (kind, place) == ("Div", 1):
            raise self.refuse("a division by the network's values is not linear")
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
            raise self.refuse(f"{text} does not fit") from None
        if len(shape) != len(self.sizes) or shape[0] != 1:
            raise self.refuse(f"{text} changes the batch axis")
        if shape.numel() > LARGEST:
            raise self.refuse(f"{text} makes more than {LARGEST} values")
        return shape

    def _linear(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        gemm = "Gemm" in self.place
        if len(given) not in ((2, 3) if gemm else (2,)):
            raise self.refuse(f"expected two inputs, got {len(given)}")
        weight = self._tensor(given[1], "a matrix")
        if weight.dim() != 2 or (gemm and len(self.sizes) != 2):
            raise self.refuse(f"expected a matrix, got {tuple(weight.shape)} for inputs of {self.sizes}")
        weight = float(attributes.get("alpha", 1.0)) * (weight if attributes.get("transB", 0) else weight.T)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=self.dtype)
        layer.weight = nn.Parameter(weight.clone())
        if len(given) > 2 and given[2] is not None:
            bias = self._tensor(given[2], "a bias")
            if bias.dim() > 2 or (bias.dim() == 2 and len(bias) != 1):
                raise self.refuse(f"a bias of {tuple(bias.shape)} changes the batch axis")
            layer.bias = nn.Parameter(float(attributes.get("beta", 1.0)) * bias.expand(1, len(weight))[0])
        return layer

    def _flatten(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        if "Reshape" not in self.place:
            if attributes.get("axis", 1) not in (1, 1 - len(self.sizes)):
                raise self.refuse(f"axis {attributes['axis']} is not known")
            return nn.Flatten()
        target, size = self.integers(given), math.prod(self.sizes)
        zero = [] if attributes.get("allowzero", 0) else [0]
        if len(target) < 2 or target[0] not in (1, -1, *zero) or target.count(-1) > 1:
            raise self.refuse(f"expected to reshape each input of {self.sizes} by itself, got {target}")
        shape = [self.sizes[i] if side == 0 and zero else side for i, side in enumerate(target) if i]
        known = math.prod(side for side in shape if side != -1)
        shape = [size // known if side == -1 and known > 0 else side for side in shape]
        if min(shape) < 1 or math.prod(shape) != size:
            raise self.refuse(f"expected to reshape each input of {self.sizes} by itself, got {target}")
        if len(shape) == 1:
            return nn.Flatten()
        flat = len(self.sizes) == 2
        return nn.Unflatten(1, tuple(shape)) if flat else nn.Sequential(nn.Flatten(), nn.Unflatten(1, tuple(shape)))

    def _dropout(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        training = given[2] if len(given) > 2 else None
        if training is not None and training.any():
            raise self.refuse("training_mode 1 is not known")
        return nn.Identity()

    def _same(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        if FLOATS.get(attributes.get("to", 0)) != self.dtype:
            raise self.refuse(
                f"the network's values stay {str(self.dtype)[6:]}, got element type {attributes.get('to')}"
            )
        return nn.Identity()

    def _conv(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        weight = self._tensor(given[1] if len(given) in (2, 3) else None, "a kernel")
        bias = self._tensor(given[2], "a bias") if len(given) > 2 and given[2] is not None else None
        if weight.dim() != 4 or len(self.sizes) != 4:
            raise self.refuse(f"expected two spatial axes, got {tuple(weight.shape)} over {self.sizes}")
        size = (weight.shape[2], weight.shape[3])
        groups = attributes.get("group", 1)
        if (
            tuple(attributes.get("kernel_shape", size)) != size
            or groups < 1
            or weight.shape[1] * groups != self.sizes[1]
        ):
            raise self.refuse(
                f"expected a kernel for {self.sizes[1]} channels, got {tuple(weight.shape)}, group {groups}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise self.refuse(f"expected a bias of {len(weight)}, got {tuple(bias.shape)}")
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
            raise self.refuse(f"dilations {attributes['dilations']} is not known")
        kernel, stride, padding = self._windows(attributes, given)
        return nn.AvgPool2d(
            kernel, stride, padding, count_include_pad=bool(attributes.get("count_include_pad", 0))
        )  # fmt: skip

    def _max_pool(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        return nn.MaxPool2d(*self._windows(attributes, given), dilation=self._pair(attributes, "dilations"))

    def _windows(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> tuple[tuple[int, int], ...]:
        """Kernel, strides and padding of a pool."""
        if len(self.sizes) != 4 or len(given) != 1:
            raise self.refuse(f"expected two spatial axes, got inputs of {self.sizes}")
        if "kernel_shape" not in attributes:
            raise self.refuse("expected kernel_shape")
        kernel, padding = self._pair(attributes, "kernel_shape"), self._padding(attributes)
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            raise self.refuse(f"expected padding of at most half the kernel {kernel}, got {padding}")
        return kernel, self._pair(attributes, "strides"), padding

    def _pair(self, attributes: dict[str, Any], name: str) -> tuple[int, int]:
        value = attributes.get(name, [1, 1])
        if len(value) != 2 or min(value) < 1 or max(value) > LARGEST:
            raise self.refuse(f"expected two positive integers for {name}, got {value}")
        return value[0], value[1]

    def _padding(self, attributes: dict[str, Any]) -> tuple[int, int]:
        pads = attributes.get("pads", [0, 0, 0, 0])
        if len(pads) != 4 or pads[:2] != pads[2:]:
            raise self.refuse(f"expected the same padding on both sides, got {pads}")
        if min(pads) < 0 or max(pads) > LARGEST:
            raise self.refuse(f"expected padding of at least 0, got {pads}")
        return pads[0], pads[1]

    def _norm(self, attributes: dict[str, Any], given: list[np.ndarray | None]) -> nn.Module:
        if len(given) != 5:
            raise self.refuse(f"expected five inputs, got {len(given)}")
        scale, bias, mean, var = (self._tensor(t, "statistics") for t in given[1:])
        channels = (self.sizes[1],)
        if not all(t.shape == channels for t in (scale, bias, mean, var)):
            raise self.refuse(f"expected statistics of {channels[0]} channels, got {tuple(scale.shape)}")
        factor = scale * torch.rsqrt(var + attributes.get("epsilon", float(np.float32(1e-5))))
        wide = (1, -1, *[1] * (len(self.sizes) - 2))
        return ElementwiseAffine(factor.view(wide), (bias - mean * factor).view(wide))


def pair(value: Any) -> list[int]:
    """Two numbers, of both axes."""
    return [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)] * 2
