"""The negative control of double rounding: lower widths by shifting bits out."""

from __future__ import annotations

from torch import Tensor, nn

from torchfolio.efficiency.double_rounding import DoubleRounding
from torchfolio.efficiency.quantized_layers import quantized_layers

__all__ = ["shifted"]


class Shifted(DoubleRounding):
    """The quantizer with a shift, which rounds down, in place of the second rounding."""

    def forward(self, x: Tensor, bit: int, samples: int = 1) -> Tensor:
        scale = self.log_scale_of(bit)[0].detach().exp()
        step = 2 ** (self.bits[0] - bit)
        return (self.integers(x).float() / step).floor().clamp(-(2 ** (bit - 1)), 2 ** (bit - 1) - 1) * step * scale


def shifted(net: nn.Module) -> nn.Module:
    """A converted network in place, the weights of its layers that switch by a shift."""
    for layer in quantized_layers(net).values():
        if not layer.fixed:
            layer.quantizer.__class__ = Shifted
    return net
