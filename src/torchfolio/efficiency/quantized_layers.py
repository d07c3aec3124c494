"""Layers that run at several bit widths from one stored integer weight, and networks of them: switch, calibrate, store.

The layers of `torchfolio.efficiency.double_rounding`; `rounding` has their equations, `bit_conversion` makes them.
Activations and batch norms keep parameters of their own for every width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.data.examples import Examples
from torchfolio.efficiency.rounding import DoubleRounding
from torchfolio.engine.modes import evaluating

__all__ = [
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "SwitchableNorm",
    "calibrate",
    "export",
    "load_export",
    "quantized_layers",
    "set_bits",
    "store",
    "use_bits",
    "widths_now",
]

Bits = int | Mapping[str, int]


class QuantizedLayer(nn.Module):
    """What quantised layers have in common, mixed into `nn.Linear`, `nn.Conv1d` or `nn.Conv2d`.

    Attributes:
        weight: real weights, or `None` once they are stored.
        integers: stored weights (int8), or `None` in training.
        bit: width now.
        fixed: whether the layer stays at the highest width.
        quantizer: quantizer of the weights.
        activation: quantiser of the inputs, or `None`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    integers: Tensor | None
    bit: int
    fixed: bool
    quantizer: DoubleRounding
    activation: DoubleRounding | None

    def begin(self, old: nn.Module, bits: Sequence[int], act: bool, fixed: bool, scale: Any) -> None:
        """Take over the weights of an ordinary layer."""
        self.weight, self.bias = old.weight, old.bias  # pyright: ignore[reportAttributeAccessIssue]
        assert self.weight is not None
        self.bit, self.fixed = max(bits), fixed
        own = bits[:1] if fixed else bits
        self.quantizer = DoubleRounding(own, scale=scale).to(self.weight)
        self.quantizer.start(self.weight)
        self.activation = DoubleRounding(own, signed=False, scale="separate").to(self.weight) if act else None
        self.register_buffer("integers", None)
        self.calibrating = False

    def quantized_weight(self) -> Tensor:
        """$\\hat W$ at the width now."""
        if self.weight is None:
            assert self.integers is not None
            return self.quantizer.from_integers(self.integers, self.bit)
        return self.quantizer(self.weight, self.bit)

    def quantized_input(self, x: Tensor) -> Tensor:
        """$\\hat X$ at the width now; on the first batch of training the scale starts from it."""
        if self.activation is None:
            return x
        if (self.training or self.calibrating) and not self.activation.known(self.bit):
            self.activation.start(x, self.bit)
        return self.activation(x, self.bit, len(x))

    @torch.no_grad()
    def store(self) -> None:
        """Keep the integers and drop the real weights, permanently."""
        if self.weight is not None:
            self.integers = self.quantizer.integers(self.weight)
            self.weight = None

    def extra_repr(self) -> str:
        stored = ", stored" if self.weight is None else ""
        return f"{super().extra_repr()}, bit={self.bit}{', fixed' if self.fixed else ''}{stored}"


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer of several widths; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A convolution of several widths; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution of several widths; made by `convert`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class SwitchableNorm(nn.Module):
    """A batch norm for every width of the layer before it, each starting as a copy of one.

    Args:
        norm: batch norm of the trained network.
        bits: widths.
        source: name of the layer that it follows.

    Reference:
        Jin et al., "AdaBits: Neural Network Quantization with Adaptive Bit-Widths", CVPR 2020, section 4.
    """

    def __init__(self, norm: nn.Module, bits: Sequence[int], source: str) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({str(b): copy.deepcopy(norm) for b in bits})
        self.bit, self.source = max(bits), source

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[str(self.bit)](x)

    def extra_repr(self) -> str:
        return f"bit={self.bit}, source={self.source!r}"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantised layers of a network by name.

    Raises:
        ValueError: if there is none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    if not layers:
        raise ValueError("the network has no quantised layer; convert it first")
    return layers


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Switch a network to a width, or its layers to widths of their own; nothing is computed.

    Args:
        model: model of `convert`, in training or stored.
        bits: a width for all layers but the fixed ones, or widths by name of some of them.

    Raises:
        ValueError: if a layer is unknown or fixed at another width, or a width was not converted for.
    """
    layers = quantized_layers(model)
    if isinstance(bits, Mapping):
        wanted = dict(bits)
    else:
        wanted = {n: bits for n, m in layers.items() if not m.fixed}
        checks.one_of("bits", bits, max((m.quantizer.bits for m in layers.values()), key=len))
    for name, bit in wanted.items():
        if name not in layers:
            raise ValueError(f"the network has no quantised layer {name!r}; it has {', '.join(layers)}")
        if bit not in layers[name].quantizer.bits:
            raise ValueError(f"expected a width of {name} in {layers[name].quantizer.bits}, got {bit!r}")
    for name, bit in wanted.items():
        layers[name].bit = bit
    for module in model.modules():
        if isinstance(module, SwitchableNorm):
            module.bit = layers[module.source].bit


def widths_now(model: nn.Module) -> dict[str, int]:
    """The width of every quantised layer, as `set_bits` takes it."""
    return {name: layer.bit for name, layer in quantized_layers(model).items()}


@contextmanager
def use_bits(model: nn.Module, bits: Bits) -> Iterator[nn.Module]:
    """Widths within a `with` block; see `set_bits`."""
    before = widths_now(model)
    try:
        set_bits(model, bits)
        yield model
    finally:
        set_bits(model, before)


@torch.no_grad()
def calibrate(model: nn.Module, data: Any, *, batch_size: int = 128) -> nn.Module:
    """Start the scales of activations that are still 0, from one batch at every width.

    Args:
        model: model of `convert`. Its norms, mode and widths are left as they are.
        data: tensors, a data set or a loader; see `torchfolio.data.Examples`. The first batch is taken.
        batch_size: examples of it.

    Returns:
        The model.

    Raises:
        ValueError: if there is no quantised layer, no example, or one that is not finite.
    """
    layers = quantized_layers(model)
    x = checks.finite("the example", next(iter(Examples(data).batches(batch_size)))[0])
    like = next(model.parameters())
    x = x.to(like.device, like.dtype if x.is_floating_point() else None)
    widths = max((m.quantizer.bits for m in layers.values()), key=len)
    try:
        for layer in layers.values():
            layer.calibrating = True
        with evaluating(model):
            for bit in widths:
                with use_bits(model, bit):
                    model(x)
    finally:
        for layer in layers.values():
            layer.calibrating = False
    return model


def store(model: nn.Module) -> nn.Module:
    """Keep int8 weights and drop the real ones in place: a network for inference that still switches widths.

    Its `state_dict` holds a byte for each quantised weight, so that it is small on disk.

    Args:
        model: model of `convert`, trained.

    Returns:
        The model.

    Raises:
        ValueError: if there is no quantised layer, or scales are separate.
    """
    for layer in quantized_layers(model).values():
        layer.store()
    return model


def export(model: nn.Module) -> dict[str, Tensor]:
    """The stored network as tensors that `safetensors` can save; the model is left as it is.

    Returns:
        `NAME.integers` (int8) and `NAME.quantizer.log_scales.H` of every layer, scales of activations and norms by width,
        and everything else of the network.
    """
    return {name: t.detach().clone() for name, t in store(copy.deepcopy(model)).state_dict().items()}


def load_export(model: nn.Module, exported: Mapping[str, Tensor]) -> nn.Module:
    """Make a network converted alike the stored one, in place.

    Args:
        model: model of `convert` with the same settings.
        exported: result of `export`.

    Raises:
        RuntimeError: if names or shapes differ.
    """
    store(model).load_state_dict(exported)
    return model
