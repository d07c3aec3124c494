"""A training step of one convolution with binary weights and activations, beside the sign's and the real one's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchfolio.efficiency.binary import SignSTEConv2d
from torchfolio.efficiency.biper import BiPerConv2d
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, 16, 16)
    kinds = {"ours": BiPerConv2d, "sign_straight_through": SignSTEConv2d, "real_weights": nn.Conv2d}
    layers: dict[str, nn.Module] = {name: kind(32, 32, 3, padding=1) for name, kind in kinds.items()}
    steps: dict[str, Any] = {
        name: lambda net=net: net(x.requires_grad_()).sum().backward() for name, net in layers.items()
    }
    bench.compare("step of a 3x3 convolution, 64 x 32 x 16 x 16", **steps)
