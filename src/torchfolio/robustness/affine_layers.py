"""Layers $x \\mapsto L x + c$ as bounds need them: forward, by the absolute values of $L$, and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from torchfolio.robustness.patch_bounds import Window, average_kernel
from torchfolio.shown import Shown

__all__ = ["Affine", "ElementwiseAffine", "Residual", "matrix_of"]


class ElementwiseAffine(nn.Module):
    """$x \\odot a + c$ with constants that broadcast: a folded batch norm, a subtracted mean."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Residual(nn.Module):
    """$F(x) + s(x)$, the sum of two paths of equal output shape.

    Args:
        body: network $F$ of layers with bounds.
        shortcut: network $s$ likewise; the identity by default.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        body, shortcut = self.body(x), self.shortcut(x)
        if body.shape != shortcut.shape:
            raise ValueError(f"expected paths of one shape, got {tuple(body.shape)} and {tuple(shortcut.shape)}")
        return body + shortcut


class Affine(Shown):
    """A layer $x \\mapsto L x + c$, forward, with the absolute values of $L$, and backward."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.mixes = isinstance(layer, nn.Linear | nn.Conv2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d)
        self.by_windows = isinstance(layer, nn.BatchNorm2d | ElementwiseAffine) or (
            isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        ) or (isinstance(layer, nn.AvgPool2d) and _plain(layer))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            scale, shift = _folded(layer, x.dim())
            return x * scale + shift
        return layer(x)

    def absolute(self, r: Tensor) -> Tensor:
        """$|L| r$."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(r, layer.weight.abs())
        if isinstance(layer, nn.Conv2d):
            # Through the layer itself, for its padding.
            return layer._conv_forward(r, layer.weight.abs(), None)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return r * _folded(layer, r.dim())[0].abs()
        if isinstance(layer, ElementwiseAffine):
            return r * layer.scale.abs()
        return layer(r)  # pools and reshapes have no negative weight and no constant

    def magnitude(self, low: Tensor, high: Tensor) -> Tensor:
        """The largest sum of absolute values that an output can be the sum of: $|L| \\max(|l|, |u|) + |c|$."""
        constant = self.forward(torch.zeros_like(low[:1])).abs()
        return self.absolute(torch.maximum(low.abs(), high.abs())) + constant

    def window_backward(self, window: Window, shape: tuple[int, ...]) -> tuple[Window, Tensor]:
        """As `backward`, of coefficients on windows."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return window.convolved(layer.weight, layer.bias, layer)
        if isinstance(layer, nn.AvgPool2d):
            return window.convolved(average_kernel(layer, shape[0], window.A), None, layer)
        assert isinstance(layer, nn.BatchNorm2d | ElementwiseAffine)
        scale, shift = _folded(layer, 4) if isinstance(layer, nn.BatchNorm2d) else (layer.scale, layer.shift)
        return window.scaled(scale.expand(1, *shape), shift.expand(1, *shape))

    def backward(self, A: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Coefficients on the outputs `[B, R, *out]` to those on the inputs `[B, R, *in]`, and what the constant gives."""
        layer = self.layer
        if isinstance(layer, nn.Linear) and len(shape) == 1:
            constant = A @ layer.bias if layer.bias is not None else A.new_zeros(A.shape[:2])
            return A @ layer.weight, constant
        flat = A.flatten(0, 1)
        if isinstance(layer, nn.Flatten | nn.Unflatten):
            return A.reshape(*A.shape[:2], *shape), A.new_zeros(A.shape[:2])
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            # A transposed convolution whose padding of the output restores `shape`.
            settings: Any = layer.stride, layer.padding, layer.dilation, layer.groups
            back = conv2d_input((len(flat), *shape), layer.weight, flat, *settings)
            constant = flat.flatten(2).sum(2) @ layer.bias if layer.bias is not None else A.new_zeros(len(flat))
            return back.view(*A.shape[:2], *shape), constant.view(A.shape[:2])
        # The transpose of any other affine map is what autograd multiplies by.
        with torch.enable_grad():
            x = torch.zeros(len(flat), *shape, dtype=A.dtype, device=A.device, requires_grad=True)
            y = self.forward(x)
            (back,) = torch.autograd.grad(y, x, flat, create_graph=A.requires_grad)
        constant = (flat * y.detach()).flatten(1).sum(1)
        return back.view(*A.shape[:2], *shape), constant.view(A.shape[:2])


def _plain(layer: nn.AvgPool2d) -> bool:
    """Whether every window of a pool has the same divisor."""
    padded = layer.padding not in (0, (0, 0)) and not layer.count_include_pad
    return not (layer.ceil_mode or padded or layer.divisor_override is not None)


def _folded(layer: nn.BatchNorm1d | nn.BatchNorm2d, dims: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, to go with inputs of `dims` axes."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise TypeError("interval bounds of a batch norm need its running statistics")
    scale = torch.rsqrt(var + layer.eps)
    scale = scale if layer.weight is None else scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    wide = (1, -1, *[1] * (dims - 2))
    return scale.view(wide), shift.view(wide)


def matrix_of(part: Affine, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """An affine layer as a matrix and a constant."""
    count = int(np.prod(shape))
    eye = torch.eye(count, dtype=torch.float64).view(count, *shape)
    constant = part.forward(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
    return (part.forward(eye).flatten(1) - constant).T.numpy(), constant[0].numpy()
