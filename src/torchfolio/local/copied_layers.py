"""Layers of the same architecture with fresh weights, at other widths and resolutions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import nn

from torchfolio.local.layered_network import Shape
from torchfolio.models import BasicBlock
from torchfolio.models.init import redraw
from torchfolio.models.pools import MeanPool2d

__all__ = ["copy_architecture", "halvings", "initialize"]


def halvings(current: Shape, target: Shape) -> float:
    """How often the resolution halves between two layers: $\\log_2$ of the ratio of their traced sides, whole where so
    many poolings, rounding up or down, lead from one to the other.

    The paper tells it by the widths, which comes to the same where a network doubles widths as it halves maps.
    """
    if len(current) != 3 or len(target) != 3 or current[1] <= target[1]:
        return 0.0
    ratio = math.log2(current[1] / target[1])
    counts = (math.floor(ratio), math.ceil(ratio))
    whole = (n for n in counts if current[1] >> n <= target[1] <= -(-current[1] >> n))
    return float(next(whole, ratio))


def copy_architecture(layer: nn.Module, before: Shape, after: Shape, in_shape: Shape, out_shape: Shape) -> nn.Module:
    """A layer of the same type with fresh weights, from `in_shape` to `out_shape`.

    Residual blocks, convolutions with norm and activation, and linear layers are rebuilt at the widths asked for.
    Any other layer is copied as it is with fresh weights; where its own input has another shape than `in_shape`,
    a 1x1 convolution (or linear layer) and a pool lead there.

    Args:
        layer: layer to copy.
        before: shape of its own input.
        after: shape of its own output.
        in_shape: shape that the copy takes.
        out_shape: shape wanted; layers copied as they are keep their own width.

    Raises:
        ValueError: if the layer cannot be adapted (features of another rank); pass `aux_factory`.
    """
    if isinstance(layer, BasicBlock):
        return initialize(BasicBlock(in_shape[0], out_shape[0], 2 if in_shape[1] > out_shape[1] else 1, shortcut="B"))
    if _is_plain(layer, nn.Conv2d) and len(in_shape) == 3:
        return initialize(_conv_like(layer, in_shape, out_shape))
    if _is_plain(layer, nn.Linear) and len(in_shape) == len(out_shape):
        return initialize(_linear_like(layer, in_shape, out_shape))
    fresh = copy.deepcopy(layer)
    redraw(fresh)
    for module in fresh.modules():
        if hasattr(module, "inplace"):  # its input is needed by the next layer as well
            setattr(module, "inplace", False)  # noqa: B010
    initialize(fresh)
    return fresh if in_shape == before else nn.Sequential(_adapter(in_shape, before), fresh)


def initialize(module: nn.Module) -> nn.Module:
    """Convolutions from $N(0, 2 / (k^2 c_{out}))$; norms and linear layers keep PyTorch's defaults."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return module


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is one weight layer of this kind with norm, activation, pool or dropout around it."""
    leaves = [m for m in layer.modules() if not list(m.children())]
    weights = [m for m in leaves if any(True for _ in m.parameters(recurse=False)) and not _is_norm(m)]
    return isinstance(layer, kind | nn.Sequential) and len(weights) == 1 and isinstance(weights[0], kind)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _first(layer: nn.Module, test: Callable[[nn.Module], bool]) -> nn.Module | None:
    return next((m for m in layer.modules() if test(m)), None)


def _activation(layer: nn.Module) -> nn.Module:
    activation = _first(
        layer, lambda m: type(m).__module__ == "torch.nn.modules.activation" and not any(True for _ in m.children())
    )
    if activation is None:
        return nn.ReLU()
    fresh = copy.deepcopy(activation)
    if hasattr(fresh, "inplace"):
        setattr(fresh, "inplace", False)  # noqa: B010
    return fresh


def _conv_like(layer: nn.Module, in_shape: Shape, out_shape: Shape) -> nn.Module:
    """Max pool where the resolution falls, 3x3 convolution (or the layer's odd kernel), norm, activation."""
    conv = _first(layer, lambda m: isinstance(m, nn.Conv2d))
    assert isinstance(conv, nn.Conv2d)
    kernel = conv.kernel_size[0] if conv.kernel_size[0] % 2 else 3
    parts: list[nn.Module] = []
    if in_shape[1] > out_shape[1]:
        parts.append(nn.MaxPool2d(2, ceil_mode=True))
    norm = _first(layer, _is_norm)
    parts.append(nn.Conv2d(in_shape[0], out_shape[0], kernel, padding=kernel // 2, bias=norm is None))
    if norm is not None:
        parts.append(nn.BatchNorm2d(out_shape[0]))
    return nn.Sequential(*parts, _activation(layer))


def _linear_like(layer: nn.Module, in_shape: Shape, out_shape: Shape) -> nn.Module:
    norm = _first(layer, _is_norm)
    parts: list[nn.Module] = [nn.Linear(in_shape[-1], out_shape[-1])]
    if norm is not None:
        parts.append(nn.BatchNorm1d(out_shape[-1]) if isinstance(norm, nn.BatchNorm1d) else nn.LayerNorm(out_shape[-1]))
    return nn.Sequential(*parts, _activation(layer))


def _adapter(in_shape: Shape, wanted: Shape) -> nn.Module:
    """From features of one shape to another of the same rank."""
    if len(in_shape) != len(wanted) or (len(wanted) == 2 and in_shape[0] != wanted[0]):
        raise ValueError(
            f"cannot lead features {in_shape} into a layer that takes {wanted}; pass aux_factory to build it"
        )
    if len(wanted) == 3:
        project = nn.Conv2d(in_shape[0], wanted[0], 1, bias=False)
        return project if in_shape[1:] == wanted[1:] else nn.Sequential(MeanPool2d(wanted[1:]), project)
    return nn.Linear(in_shape[-1], wanted[-1], bias=False)
