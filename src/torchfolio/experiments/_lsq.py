"""LSQ, a learned step size for one width alone: what networks that switch between widths are measured against.

Reference: Esser et al., "Learned Step Size Quantization", ICLR 2020.
"""

from __future__ import annotations

from torch import Tensor, nn

from torchfolio.efficiency.double_rounding import DoubleRounding, MultiPrecision
from torchfolio.efficiency.quantized_layers import quantized_layers
from torchfolio.efficiency.straight_through import round_ste
from torchfolio.engine.rules import Batch

__all__ = ["OneWidth", "elementary"]


class OneWidth(MultiPrecision):
    """Training at one width alone, by one learning rate; the first and the last layer stay at the highest."""

    def __init__(self, bit: int) -> None:
        super().__init__(alrs=None)
        self.bit = bit

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        module = super().prepare(model, example)
        self.bits = (self.bit,)
        return module


class Chain(DoubleRounding):
    """The quantizer from elementary operations, as a user would write it."""

    def forward(self, x: Tensor, bit: int, samples: int = 1) -> Tensor:
        scale = self.log_scale_of(bit)[0].exp()
        low, high = (-(2 ** (bit - 1)), 2 ** (bit - 1) - 1) if self.is_signed() else (0, 2**bit - 1)
        return round_ste((x / scale).clamp(low, high)) * scale


def elementary(net: nn.Module) -> nn.Module:
    """A converted network in place, its quantizers from elementary operations."""
    for layer in quantized_layers(net).values():
        layer.quantizer.__class__ = Chain
        if layer.activation is not None:
            layer.activation.__class__ = Chain
    return net
