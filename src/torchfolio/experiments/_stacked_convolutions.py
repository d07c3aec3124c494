"""Convolutional networks of given shapes with named layers, as many as one likes from different initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchfolio.data import DataSplits
from torchfolio.engine import fit, seeded
from torchfolio.engine.recipes import adam
from torchfolio.runs import Run


def network(settings: Any, data: DataSplits) -> nn.Sequential:
    """Convolutions, a fully connected layer and a classifier; every child ends in its ReLU."""
    net = nn.Sequential()
    width = data.shape[0]
    for k, (channels, side, stride) in enumerate(
        zip(settings.channels, settings.kernels, settings.strides, strict=True), start=1
    ):
        conv = nn.Conv2d(width, channels, side, stride, settings.padding)
        net.add_module(f"conv{k}", nn.Sequential(conv, nn.ReLU()))
        width = channels
    features = net(torch.zeros(1, *data.shape)).numel()
    net.add_module("fc1", nn.Sequential(nn.Flatten(), nn.Linear(features, settings.hidden), nn.ReLU()))
    net.add_module("head", nn.Linear(settings.hidden, data.num_classes))
    return net


def fresh(run: Run[Any], data: DataSplits, index: int) -> nn.Sequential:
    """The network of this index before training; no two of any seeds begin alike."""
    with seeded(1000 * run.seed + index):
        return network(run.settings, data).to(run.device)


def trained(run: Run[Any], data: DataSplits, index: int) -> nn.Sequential:
    """That network after training."""
    net, s, seed = fresh(run, data, index), run.settings, 1000 * run.seed + index
    budget = {"epochs": s.epochs, "batch_size": s.batch_size, "seed": seed, "device": run.device}
    fit(net, data.train, optimizer=adam(s.lr), progress=False, **budget)
    return net
