"""Step time, inference time and size of a binary ResNet-20 against the float one and the plain sign.

The float network is the floor: torch has no kernels for weights of one bit, so a binary layer can only add to its
time. Batches of CIFAR-10's shape, in alternation in one process. Run it with

    python benchmarks/bench_biper.py [--batch 128] [--rounds 7]

Measured (2 cores, torch 2.13, batch 128), time over that of the float network, median and quartiles:

    training step   plain sign 1.04 (0.97-1.07), BiPer stage 1 1.02 (0.94-1.02), stage 2 0.98 (0.93-1.01),
                    stage 2 with binary inputs 1.50 (1.47-1.56)
    inference       packed 1.08 (1.06-1.08), packed with binary inputs 1.26 (1.25-1.28)
    bytes           1,084,544 float, 51,584 packed: 21 times smaller, norms and first and last layer included
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.efficiency.binary import BinaryLayer, SignSTEConv2d, conv_arguments
from torchfolio.efficiency.biper import binarize, pack
from torchfolio.efficiency.compression import tensor_bytes
from torchfolio.measure import alternate
from torchfolio.models import replace_layers, resnet20


def sign_network() -> nn.Module:
    """ResNet-20 with the signs of its weights, in the layers that `binarize` takes."""

    def convert(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Conv2d)
        return SignSTEConv2d(**conv_arguments(old), binary_input=False)

    return replace_layers(binarize(resnet20(), binary_input=False), BinaryLayer, convert)


def networks() -> dict[str, nn.Module]:
    """The float network and the binary ones, with real inputs and with binary ones."""
    return {
        "float": resnet20(),
        "sign": sign_network(),
        "biper_stage_1": binarize(resnet20(), binary_input=False),
        "biper_stage_2": binarize(resnet20(), binary_input=False, stage=2),
        "biper_binary_input": binarize(resnet20(), stage=2),
    }


def stepper(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def caller(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass in evaluation mode."""
    net.eval()
    return torch.inference_mode()(lambda: net(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    x, y = torch.randn(arguments.batch, 3, 32, 32), torch.randint(10, (arguments.batch,))
    print("training step")
    steppers: dict[str, Any] = {name: stepper(net, x, y) for name, net in networks().items()}
    print(alternate(**steppers, repeats=arguments.rounds))
    small = {
        "float": resnet20(),
        "packed": pack(binarize(resnet20(), binary_input=False)),
        "packed_binary_input": pack(binarize(resnet20())),
    }
    print("inference")
    callers: dict[str, Any] = {name: caller(net, x) for name, net in small.items()}
    print(alternate(**callers, repeats=arguments.rounds))
    for name, net in small.items():
        print(
            f"{name:>20}: {tensor_bytes(net):9,} bytes, {tensor_bytes(small['float']) / tensor_bytes(net):.1f} x smaller"
        )


if __name__ == "__main__":
    main()
