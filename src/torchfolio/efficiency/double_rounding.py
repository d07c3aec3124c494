"""Double Rounding: one network for several bit widths, of which only the highest integers are stored.

Haiduo Huang, Zhenhua Liu, Tian Xia, Wenzhe Zhao, Pengju Ren, "Nearly Lossless Adaptive Bit Switching", 2025,
https://arxiv.org/abs/2502.01199.

A device that changes its precision with load or battery needs no second model: low widths are rounded a second time
from the stored int8 weights (see `rounding`, `quantized_layers` and `bit_conversion`). They are trained all
together, at learning rates that adapt to each (`switching_rules`), or as random mixtures of widths, drawn with a view to
the curvature of every layer, from which `search_bits` picks one for a budget without training (`mixed_precision`).

    net = convert(net, bits=(8, 6, 4, 2), example=x)
    fit(net, train, rule=MultiPrecision(), optimizer=adam(1e-3), scheduler=cosine(), epochs=3)
    net = store(net)                          # a byte per weight
    set_bits(net, 4)                          # at any time

`torchfolio compress net/ --method double_rounding --data cifar10 -o small/` does the same for a network on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from torchfolio import checks
from torchfolio.efficiency.bit_conversion import convert
from torchfolio.efficiency.compression import Compression, Phase
from torchfolio.efficiency.mixed_precision import (
    MixedPrecision,
    multiply_adds,
    pareto_bits,
    search_bits,
    weight_traces,
)
from torchfolio.efficiency.quantized_layers import (
    SwitchableNorm,
    calibrate,
    export,
    load_export,
    set_bits,
    store,
    use_bits,
    widths_now,
)
from torchfolio.efficiency.rounding import DoubleRounding, check_bits, double_round
from torchfolio.efficiency.switching_rules import MultiPrecision, eta
from torchfolio.measure import count_flops

__all__ = [
    "BitSwitching",
    "DoubleRounding",
    "MixedPrecision",
    "MultiPrecision",
    "SwitchableNorm",
    "calibrate",
    "convert",
    "double_round",
    "eta",
    "export",
    "load_export",
    "pareto_bits",
    "search_bits",
    "set_bits",
    "store",
    "switchable",
    "use_bits",
    "weight_traces",
    "widths_now",
]


class BitSwitching(Compression):
    """Double Rounding as a way to shrink a trained network: convert, train all widths together, store int8.

    The written network switches widths (`set_bits`) after it is loaded. Train for so many epochs that the running
    statistics of every width's norms settle, which takes about 30 steps: a network that was trained for less may answer
    badly although its loss was small.

    Args:
        bits: widths, each from 2 to 8.
        bit: width that the written network runs at until it is switched; the highest by default.
        fixed: names of layers that stay at the highest width; by default the first and the last.
        act: whether to quantise activations too.
        norm: norm, see `convert`.
        alrs: rule for learning rates of the scales, see `MultiPrecision`.

    Raises:
        ValueError: if widths are repeated or out of range, or `bit` is none of them.

    Example:
        >>> small = compress(net, BitSwitching(bit=4), train, example=x, epochs=3).model  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (8, 6, 4, 2),
        bit: int | None = None,
        fixed: Sequence[str] | None = None,
        act: bool = True,
        norm: Literal["switchable", "shared"] = "switchable",
        alrs: Literal["full", "ratio"] | None = "full",
    ) -> None:
        self.bits = check_bits(bits)
        self.bit = self.bits[0] if bit is None else checks.one_of("bit", bit, self.bits)
        self.fixed, self.act = fixed, act
        self.norm: Literal["switchable", "shared"] = checks.one_of("norm", norm, ("switchable", "shared"))
        self.rule = MultiPrecision(alrs=alrs)

    def convert(self, model: nn.Module, example: Tensor) -> nn.Module:
        return convert(model, self.bits, fixed=self.fixed, act=self.act, norm=self.norm, example=example)

    def phases(self, model: nn.Module) -> Iterator[Phase]:
        yield Phase("all widths together", rule=self.rule)

    def finish(self, model: nn.Module) -> nn.Module:
        set_bits(store(model), self.bit)
        return model

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        arguments = {"model": network, "bits": list(self.bits), "bit": self.bit, "act": self.act, "norm": self.norm}
        if self.fixed is not None:
            arguments["fixed"] = list(self.fixed)
        return {"build": "torchfolio.efficiency.double_rounding:switchable", "arguments": arguments}

    def operations(self, model: nn.Module, example: Tensor) -> dict[str, int]:
        widths = widths_now(model)
        work = multiply_adds(model, example)
        total = sum(n * widths[name] ** 2 for name, n in work.items())
        return {"flops": count_flops(model, example) - 2 * sum(work.values()), "bit_operations": total}


def switchable(
    model: nn.Module,
    bits: Sequence[int] = (8, 6, 4, 2),
    bit: int | None = None,
    fixed: Sequence[str] | None = None,
    act: bool = True,
    norm: Literal["switchable", "shared"] = "switchable",
) -> nn.Module:
    """The structure of a stored network, into which its state dict is loaded: what a bundle builds.

    Args:
        model: network before its conversion.
        bits: numbers of bits, see `convert`.
        bit: width that it runs at; the highest by default.
        fixed: names, as in `convert`.
        act: whether activations are rounded, as in `convert`.
        norm: kind of batch norm, as in `convert`.
    """
    converted = store(convert(model, bits, fixed=fixed, act=act, norm=norm))
    if bit is not None:
        set_bits(converted, bit)
    return converted
