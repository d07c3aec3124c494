"""The classifier that copies are made of: strided convolutions, a residual network for photographs, or anybody's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchfolio.data import DataSplits
from torchfolio.engine.recipes import adam
from torchfolio.models import ResNetCIFAR
from torchfolio.runs import Run
from torchfolio.runs.tasks import own_network


def classifier(run: Run[Any], data: DataSplits) -> nn.Module:
    """A trained network."""
    s = run.settings
    torch.manual_seed(run.seed)
    net = own_network(s, data, lambda: two_convolutions(data) if data.shape[0] == 1 else residual(data))
    run.fit(net, data.train, optimizer=adam(s.lr), epochs=s.epochs, batch_size=64)
    return net


def two_convolutions(data: DataSplits) -> nn.Module:
    """Convolutions of stride 2, on small images 3 wide."""
    channels, side = data.shape[0], data.shape[1]
    kernel = 5 if side >= 16 else 3
    small = ((side - kernel) // 2 + 1 - kernel) // 2 + 1
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel, 2), nn.ReLU(), nn.Conv2d(16, 32, kernel, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * small**2, data.num_classes),
    )  # fmt: skip


def residual(data: DataSplits) -> nn.Module:
    return ResNetCIFAR(20, num_classes=data.num_classes)
