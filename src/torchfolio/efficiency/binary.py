"""Layers with weights of +1 and -1: what every binarisation shares, the plain sign as baseline, and packed storage.

A binary layer computes, for weights $w^q \\in \\{-1, +1\\}$ and a learned scale $\\alpha_o$ per output channel,

$$y = \\alpha \\odot (w^q * a) + b.$$

A method says how the real weights that are trained become $w^q$ (`effective_weight`). `pack` replaces trained layers
by ones that hold a bit per weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.efficiency.straight_through import polynomial_sign, sign, sign_ste
from torchfolio.models import replace_layers

__all__ = [
    "BinaryLayer",
    "PackedConv2d",
    "PackedLinear",
    "SignSTEConv2d",
    "SignSTELinear",
    "binarize_input",
    "export_binary",
    "load_binary",
    "pack",
    "pack_bits",
    "unpack_bits",
]


def binarize_input(x: Tensor, *, normalize: bool, batch_axes: int = 1) -> Tensor:
    """Inputs as +1 and -1, with the gradient of a piecewise quadratic that is close to the sign.

    Args:
        x: inputs, `[B, ...]`.
        normalize: whether to divide every example by its standard deviation first (no mean is subtracted). The signs
            are the same; it keeps values in $[-1, 1]$, where the gradient is not zero.
        batch_axes: number of leading axes that count examples.
    """
    if normalize:
        axes = list(range(batch_axes, x.dim()))
        count = math.prod(x.shape[batch_axes:])
        x = x * torch.rsqrt(x.var(axes, correction=int(count > 1), keepdim=True) + 1e-5)
    return polynomial_sign(x)


class BinaryLayer(nn.Module):
    """What binary layers have in common, mixed into `nn.Conv2d` or `nn.Linear`.

    Attributes:
        weight: real weights, which are trained.
        alpha: `[out]`, scale of every output channel, uniform in (0, 1) at first.
        binary_input: whether inputs are binarised too.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    alpha: nn.Parameter
    binary_input: bool

    def _start(self, binary_input: bool) -> None:
        """Finish the construction of the layer beside this mixin."""
        self.binary_input = binary_input
        self.alpha = nn.Parameter(torch.rand(len(self.weight), device=self.weight.device, dtype=self.weight.dtype))
        nn.init.kaiming_normal_(self.weight)

    def effective_weight(self) -> Tensor:
        """Weights as the forward pass sees them, before the scale; the shape of `weight`."""
        raise NotImplementedError

    def binary_weight(self) -> Tensor:
        """Weights of +1 and -1 that the trained layer stands for, without a gradient."""
        raise NotImplementedError

    def adopt(self, old: nn.Conv2d | nn.Linear) -> None:
        """Take over the parameters of an ordinary layer themselves: what they share with other layers, whether they are
        frozen and of what type they are stays."""
        for name in ("weight", "bias"):
            setattr(self, name, getattr(old, name))
        self.alpha.data = self.alpha.data.to(old.weight)

    def _scaled_weight(self) -> Tensor:
        # The scale goes on the weights, not on the larger output: the same product, fewer operations and less saved.
        return self.effective_weight() * self.alpha.view(-1, *[1] * (self.weight.dim() - 1))

    def _input(self, x: Tensor) -> Tensor:
        if not self.binary_input:
            return x
        unbatched = x.dim() < self.weight.dim()
        return binarize_input(x, normalize=self.training, batch_axes=0 if unbatched else 1)


def conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """Arguments that make a convolution of the same geometry."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None}


def linear_arguments(linear: nn.Linear) -> dict[str, Any]:
    """Arguments that make a linear layer of the same size."""
    return {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}


class _SignSTE(BinaryLayer):
    def effective_weight(self) -> Tensor:
        return sign_ste(self.weight)

    def binary_weight(self) -> Tensor:
        return sign(self.weight)


class SignSTEConv2d(_SignSTE, nn.Conv2d):
    """A convolution with the signs of its weights and the clipped straight-through gradient: the baseline.

    Args:
        *args: arguments of `nn.Conv2d`.
        binary_input: binarise the inputs too.
        **kwargs: arguments of `nn.Conv2d`.

    Shapes:
        As `nn.Conv2d`.

    Reference:
        Hubara et al., "Binarized Neural Networks", NeurIPS 2016; inputs and scales as in `BiPerConv2d`.
    """

    def __init__(self, *args: Any, binary_input: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start(binary_input)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self._input(x), self._scaled_weight(), self.bias)


class SignSTELinear(_SignSTE, nn.Linear):
    """A linear layer with the signs of its weights; see `SignSTEConv2d`."""

    def __init__(self, *args: Any, binary_input: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start(binary_input)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._input(x), self._scaled_weight(), self.bias)


def pack_bits(weight: Tensor) -> Tensor:
    """A bit per weight, 1 where it is at least 0: `[...]` to uint8 `[ceil(n / 8)]`, the first weight in the lowest bit."""
    bits = F.pad((weight.detach().flatten() >= 0).to(torch.uint8), (0, -weight.numel() % 8)).view(-1, 8)
    return (bits << _places(bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of +1 and -1 that `pack_bits` packed."""
    bits = (packed[:, None] >> _places(packed.device)) & 1
    return bits.flatten()[: math.prod(shape)].view(shape).to(dtype).mul_(2).sub_(1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


class _Packed(nn.Module):
    """A trained binary layer that holds a bit per weight; for inference. Gradients reach its input alone."""

    bits: Tensor
    alpha: Tensor

    def _start(self, shape: tuple[int, ...], binary_input: bool, like: Tensor) -> None:
        self.shape, self.binary_input = shape, binary_input
        self.register_parameter("weight", None)
        self.register_buffer("bits", torch.zeros(-(-math.prod(shape) // 8), dtype=torch.uint8, device=like.device))
        self.register_buffer("alpha", torch.ones(shape[0], dtype=like.dtype, device=like.device))

    def unpacked(self) -> Tensor:
        """The weights as the forward pass sees them: of +1 and -1, times the scale."""
        weight = unpack_bits(self.bits, self.shape, self.alpha.dtype)
        return weight * self.alpha.view(-1, *[1] * (len(self.shape) - 1))

    def _input(self, x: Tensor) -> Tensor:
        return binarize_input(x, normalize=False) if self.binary_input else x


class PackedConv2d(_Packed, nn.Conv2d):
    """A binary convolution of a bit per weight, made by `pack`; arguments of `nn.Conv2d` and `binary_input`."""

    def __init__(self, *args: Any, binary_input: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start(tuple(self.weight.shape), binary_input, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self._input(x), self.unpacked(), self.bias)


class PackedLinear(_Packed, nn.Linear):
    """A binary linear layer of a bit per weight, made by `pack`; arguments of `nn.Linear` and `binary_input`."""

    def __init__(self, *args: Any, binary_input: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start(tuple(self.weight.shape), binary_input, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._input(x), self.unpacked(), self.bias)


def pack(model: nn.Module) -> nn.Module:
    """Replace the binary layers of a trained network in place by ones that hold a bit per weight.

    In evaluation mode the outputs are the same to the bit. `state_dict` then holds packed weights, so that a network
    saved by `torchfolio.bundle.save_bundle` or `safetensors` is small on disk.

    Args:
        model: a network with `BinaryLayer`s. Layers of a method in stages are taken as their binary weights.

    Returns:
        The model.

    Raises:
        ValueError: if there is no binary layer.
    """
    return replace_layers(model, BinaryLayer, _packed)


def _packed(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        packed = PackedConv2d(**conv_arguments(layer), binary_input=layer.binary_input)  # pyright: ignore[reportArgumentType]
    else:
        assert isinstance(layer, nn.Linear)
        packed = PackedLinear(**linear_arguments(layer), binary_input=layer.binary_input)  # pyright: ignore[reportArgumentType]
    if isinstance(layer, BinaryLayer):
        _fill(packed, pack_bits(layer.binary_weight()), layer.alpha.detach())
    packed.bias = layer.bias  # pyright: ignore[reportAttributeAccessIssue]
    return packed


def _fill(layer: PackedConv2d | PackedLinear, bits: Tensor, alpha: Tensor) -> None:
    layer.bits, layer.alpha = bits.to(layer.bits.device), alpha.clone().to(layer.alpha)


def export_binary(model: nn.Module) -> dict[str, Tensor]:
    """The binary layers of a network, packed: tensors that `safetensors` can save.

    Returns:
        For every layer `NAME.bits` (uint8, eight weights a byte), `NAME.alpha` (`[out]`) and `NAME.shape` (int64).

    Raises:
        ValueError: if there is no binary layer.
    """
    exported: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLayer):
            exported[f"{name}.bits"] = pack_bits(layer.binary_weight())
            exported[f"{name}.alpha"] = layer.alpha.detach().clone()
            exported[f"{name}.shape"] = torch.tensor(layer.weight.shape)
    if not exported:
        raise ValueError("the network has no binary layer to export; convert it first")
    return exported


def load_binary(model: nn.Module, exported: Mapping[str, Tensor]) -> nn.Module:
    """Replace the binary layers of a network in place by packed ones with exported weights.

    Args:
        model: a network converted alike; its other layers (norms, biases, first and last layer) are kept.
        exported: result of `export_binary`.

    Raises:
        ValueError: if layers or shapes differ.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)}
    packed_names = {key.removesuffix(".bits") for key in exported if key.endswith(".bits")}
    if set(layers) != packed_names:
        odd = sorted(set(layers) ^ packed_names)
        raise ValueError(f"expected weights for the binary layers of the network, but these differ: {', '.join(odd)}")
    for name, layer in layers.items():
        got, expected = tuple(exported[f"{name}.shape"].tolist()), tuple(layer.weight.shape)
        if got != expected:
            raise ValueError(f"expected weights of shape {expected} for {name}, got {got}")
    pack(model)
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedConv2d | PackedLinear)
        _fill(layer, exported[f"{name}.bits"], exported[f"{name}.alpha"])
    return model
