"""A training step of the small network, beside backpropagation through time and a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.spiking.bptt import BPTT, SequenceRule
from torchfolio.spiking.losses import SLTTLoss
from torchfolio.spiking.nets import SpikingConvNet
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.sltt import SLTT
from torchfolio.spiking.state import reset_state


def peers(bench: Any) -> None:
    x, y = torch.rand(128, 1, 14, 14), torch.arange(128) % 10

    def net() -> nn.Module:
        return SpikingConvNet((1, 14, 14), 10, (16, 32), partial(LIF, tau=1.1))

    def stepper(rule: SequenceRule) -> Callable[[], Any]:
        rule.prepare(net(), (x, y)).train()
        return lambda: rule.step((x, y), Tensor.backward)

    hand, loss = net(), SLTTLoss()
    for neuron in hand.modules():
        if isinstance(neuron, LIF):
            neuron.detach_state = True

    def loop() -> None:
        reset_state(hand)
        for _ in range(6):
            (loss(hand(x), y) / 6).backward()

    bench.compare(
        "a step of two convolutions, T = 6, 128 images", ours=stepper(SLTT(timesteps=6)),
        by_hand=loop, bptt=stepper(BPTT(timesteps=6)),
    )  # fmt: skip
    bench.compare(
        "the same, backward at one step", ours=stepper(SLTT(timesteps=6, k=1)), bptt=stepper(BPTT(timesteps=6))
    )
