"""Time and memory of a training step: backpropagation through time, SLTT, SLTT-K, and the floor.

The network of the experiment at 28x28, batch 64, over T time steps. The floor is what no rule can beat: T forward
passes without a graph and K forward and backward passes of the same network without state (neurons replaced by
ReLUs).

    python benchmarks/bench_sltt.py [--timesteps 6] [--batch 64] [--rounds 9]

Measured on one thread of a small cloud CPU, medians of paired ratios against BPTT: SLTT 0.85 (0.80 to 0.85), SLTT-2 0.53,
SLTT-1 0.46, at 15.7 MB saved for backward in the place of 92.0. The floor of six steps backward is 0.64, of one 0.34.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.measure import alternate, saved_bytes
from torchfolio.spiking.bptt import BPTT, SequenceRule
from torchfolio.spiking.nets import SpikingConvNet
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.sltt import SLTT

NEURON = partial(LIF, tau=1.1)


def network(neuron: Callable[[], nn.Module] = NEURON) -> nn.Module:
    torch.manual_seed(0)
    return SpikingConvNet((1, 28, 28), neuron=neuron)


def by_rule(rule: SequenceRule, x: Tensor, y: Tensor) -> Callable[[], None]:
    net = network()
    rule.prepare(net, (x, y))

    def step() -> None:
        net.zero_grad(set_to_none=True)
        rule.step((x, y), Tensor.backward)

    return step


def floor(x: Tensor, y: Tensor, timesteps: int, k: int) -> Callable[[], None]:
    net = network(nn.ReLU)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        for t in range(timesteps):
            with torch.set_grad_enabled(t < k):
                loss = F.cross_entropy(net(x), y)
            if t < k:
                loss.backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    steps = arguments.timesteps
    x, y = torch.randn(arguments.batch, 1, 28, 28), torch.randint(10, (arguments.batch,))
    steppers: dict[str, Any] = {
        "bptt": by_rule(BPTT(timesteps=steps), x, y),
        "sltt": by_rule(SLTT(timesteps=steps), x, y),
        "sltt_2": by_rule(SLTT(timesteps=steps, k=min(2, steps)), x, y),
        "sltt_1": by_rule(SLTT(timesteps=steps, k=1), x, y),
        "floor_all": floor(x, y, steps, steps),
        "floor_1": floor(x, y, steps, 1),
    }
    print(alternate(**steppers, repeats=arguments.rounds))
    for name in ("bptt", "sltt"):
        print(f"{name:>10}: {saved_bytes(steppers[name]).peak / 1e6:7.1f} MB saved for backward at the peak")


if __name__ == "__main__":
    main()
