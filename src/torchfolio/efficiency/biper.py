"""BiPer: binary networks trained through a periodic function.

Edwin Vargas, Claudia V. Correa, Carlos Hinojosa, Henry Arguello, "BiPer: Binary Neural Networks using a Periodic
Function", CVPR 2024, https://arxiv.org/abs/2404.01278.

A network whose weights are +1 and -1 takes a thirtieth of the memory. The usual way to train one is $w^q =
\\operatorname{sign}(w)$ with a gradient that pretends the sign was the identity. BiPer sends the real weight through a
square wave instead, and takes the derivative of the sine of the same period, which is a real derivative of something
close by:

$$w^q = \\operatorname{sign}(\\sin \\omega_0 w), \\qquad
\\frac{\\partial L}{\\partial w} = \\frac{\\partial L}{\\partial w^q}\\, \\omega_0 \\cos \\omega_0 w.$$

Training has two stages. In the first the layer uses $\\hat w = \\sin \\omega_0 w$ itself, in the second, from the
weights of the first and at a smaller learning rate, the square wave. The frequency $\\omega_0$ says how far $\\hat w$
is from binary: `quantization_error`, `laplace_qe`, `frequency_for`.

    net = binarize(net)                      # convolutions but the first, with their weights
    fit(net, train, epochs=60, ...)          # stage 1
    set_stage(net, 2)
    fit(net, train, epochs=30, ...)          # stage 2, learning rate five times smaller
    net = pack(net)                          # a bit per weight

`torchfolio compress net/ --method biper --data cifar10 -o small/` does the same for a network on disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.efficiency.binarization import binarize
from torchfolio.efficiency.binary import (
    PackedConv2d,
    PackedLinear,
    SignSTEConv2d,
    SignSTELinear,
    export_binary,
    load_binary,
    pack,
)
from torchfolio.efficiency.binary_error import frequency_for, laplace_qe, quantization_error
from torchfolio.efficiency.compression import Compression, Phase
from torchfolio.efficiency.periodic_layers import BiPerConv2d, BiPerLinear, biper_layers, checked_stage
from torchfolio.engine import Backprop
from torchfolio.engine.rules import default_loss
from torchfolio.measure import flops_by_module

__all__ = [
    "BiPer",
    "BiPerConv2d",
    "BiPerLinear",
    "SignSTEConv2d",
    "SignSTELinear",
    "binarize",
    "export_binary",
    "frequency_for",
    "laplace_qe",
    "load_binary",
    "pack",
    "quantization_error",
    "set_stage",
    "sine_decay",
]


def set_stage(model: nn.Module, stage: int) -> None:
    """Set the stage of every BiPer layer: 1 for the sine, 2 for the square wave.

    Warns if stage 2 is set on weights that were never trained in stage 1.

    Raises:
        ValueError: if the stage is not 1 or 2, or there is no BiPer layer.
    """
    layers = biper_layers(model)
    checked_stage(stage)
    if stage == 2 and not all(bool(layer.trained) for layer in layers.values()):
        warnings.warn("stage 2 starts from weights that were not trained in stage 1", stacklevel=2)
    for layer in layers.values():
        layer.stage = stage
        layer._look = True


def sine_decay(model: nn.Module) -> Tensor:
    """$\\sum_l \\operatorname{mean} \\sin^2(\\omega_0 w_l)$ over the BiPer layers, a scalar with a gradient.

    The released code adds it to the loss on CIFAR, times 0.037 in stage 1 and 0.0468 in stage 2. It pulls
    $\\sin \\omega_0 w$ towards zero.
    """
    return torch.stack([(m.frequency * m.weight).sin().square().mean() for m in biper_layers(model).values()]).sum()


class BiPer(Compression):
    """BiPer as a way to shrink a trained network: convert, two stages of training, pack.

    Two thirds of the epochs train $\\sin \\omega_0 w$, one third the square wave, at a learning rate 0.18 and a weight
    decay 0.1 times as large: the proportions of the released CIFAR-10 recipe.

    Args:
        frequency: $\\omega_0$.
        binary_input: binarise inputs too; see `binarize`. Off by default, because most networks have ReLUs.
        match: start from the function of the trained network; see `binarize`.
        sine_decay: weight $\\tau$ of `sine_decay` in the loss (the released code: about 0.04 on CIFAR).
        layers: names of the layers to make binary; by default as in `binarize`.

    Raises:
        ValueError: if `sine_decay` is negative; see `binarize` for the rest.

    Example:
        >>> small = compress(net, BiPer(), train, epochs=9).model  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        frequency: float = 20.0,
        binary_input: bool = False,
        match: bool = True,
        sine_decay: float = 0.0,
        layers: Sequence[str] | None = None,
    ) -> None:
        checks.at_least("sine_decay", sine_decay, 0)
        checks.positive("frequency", frequency)
        self.frequency, self.binary_input, self.match = frequency, binary_input, match
        self.sine_decay, self.layers = sine_decay, layers

    def convert(self, model: nn.Module, example: Tensor) -> nn.Module:
        return binarize(
            model, frequency=self.frequency, where=self.layers, binary_input=self.binary_input, match=self.match
        )

    def phases(self, model: nn.Module) -> Iterator[Phase]:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            return default_loss(output, target) + self.sine_decay * sine_decay(model)

        rule = Backprop(loss) if self.sine_decay else None
        set_stage(model, 1)
        yield Phase("sine", share=2 / 3, rule=rule)
        set_stage(model, 2)
        yield Phase("square wave", share=1 / 3, lr=0.18, weight_decay=0.1, rule=rule)

    def finish(self, model: nn.Module) -> nn.Module:
        return pack(model)

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        arguments = {"frequency": self.frequency, "binary_input": self.binary_input, "model": network}
        if self.layers is not None:
            arguments["where"] = list(self.layers)
        converted = {"build": "torchfolio.efficiency.biper:binarize", "arguments": arguments}
        return {"build": "torchfolio.efficiency.binary:pack", "arguments": {"model": converted}}

    def operations(self, model: nn.Module, example: Tensor) -> dict[str, int]:
        rows = flops_by_module(model, example)
        flops = rows["flops"].to_numpy()
        binary = rows["type"].isin([PackedConv2d.__name__, PackedLinear.__name__]).to_numpy()
        # A product with a weight of +1 or -1 is a change of sign; where the input is binary too, it is an XNOR.
        kind = "binary_operations" if self.binary_input else "sign_operations"
        return {"flops": int(flops[~binary].sum()), kind: int(flops[binary].sum())}
