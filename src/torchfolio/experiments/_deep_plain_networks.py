"""Deep networks without shortcuts and norms, whose initial weights decide whether they train."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from torchfolio.data import DataSplits
from torchfolio.engine.recipes import sgd
from torchfolio.layers.filter_design import init_
from torchfolio.runs import Run
from torchfolio.runs.tasks import accuracy

__all__ = ["deep"]


def deep(run: Run[Any], data: DataSplits, scheme: str) -> dict[str, float]:
    """A deep plain network: standard deviations of its first and last outputs before training, and accuracy."""
    s = run.settings
    widths = (data.shape[0], *[12] * s.depth)
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    net = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.ReLU())),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, data.num_classes))  # fmt: skip
    x = data.train.tensors[0][:256]
    init_(net[:-1], scheme, data=x, generator=run.generator())
    with torch.no_grad():
        stds, signal = [], x
        for conv in convolutions:
            signal = conv(signal)
            stds.append(float(signal.std()))
            signal = signal.relu()
    budget = {"epochs": s.epochs, "batch_size": 64, "clip_norm": 5.0}
    run.fit(net, data.train, optimizer=sgd(0.02, nesterov=False), progress=False, **budget)
    return {"accuracy": accuracy(net, data.test), "first": stds[0], "ratio": stds[-1] / stds[0]}
