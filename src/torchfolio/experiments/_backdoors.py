"""What the experiments on backdoors share: attacks on small images, and the networks that fall victim."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchfolio.backdoor import (
    AllToAll,
    AllToOne,
    BlendTrigger,
    CleanLabel,
    LabelMap,
    PatchTrigger,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
)
from torchfolio.backdoor.zoo import Normalize, ResNet18CIFAR, SmallConvNet
from torchfolio.data import DataSplits
from torchfolio.fitting import fitting_network

Pair = tuple[Tensor, Tensor]


def attack(name: str, data: DataSplits) -> tuple[Trigger, LabelMap]:
    """Trigger and labels of an attack by name; the target is class 0."""
    classes, shape = data.num_classes, data.shape
    attacks: dict[str, tuple[Trigger, LabelMap]] = {
        "badnets": (patch(shape), AllToOne(0, classes)),
        "blend": (BlendTrigger.noise(shape, alpha=0.2), AllToOne(0, classes)),
        # A shift by one would be the very map that wrong labels are often made by.
        "all_to_all": (patch(shape), AllToAll(classes, shift=3)),
        "warp": (WarpTrigger(), AllToOne(0, classes)),
        "sinusoid": (SinusoidTrigger(), CleanLabel(0, classes)),
    }
    if name not in attacks:
        raise ValueError(f"expected an attack among {', '.join(attacks)}, got {name!r}")
    return attacks[name]


def patch(shape: tuple[int, ...]) -> Trigger:
    """A checkerboard at the corner of small images, and near that of others."""
    small = min(shape[1:]) < 16
    return PatchTrigger.checkerboard(shape, size=2 if small else 3, margin=0 if small else 1)


def perceptron(data: DataSplits) -> nn.Module:
    """A network without convolutions."""
    front = Normalize([0.5] * data.shape[0], [0.5] * data.shape[0])
    return nn.Sequential(
        front, nn.Flatten(), nn.Linear(math.prod(data.shape), 64), nn.ReLU(), nn.Linear(64, data.num_classes)
    )


def victim(data: DataSplits, network: str, width: int, seed: int) -> nn.Module:
    """A new network that normalises its inputs by itself: one of two by name, or a user's by import path."""
    torch.manual_seed(seed)
    kinds = {"conv": SmallConvNet, "resnet18": ResNet18CIFAR}
    if network in kinds:
        net = kinds[network](data.shape[0], data.num_classes, width=width)
    else:
        net = fitting_network(network, data)
    mean, std = data.mean.flatten().tolist(), data.std.flatten().tolist()
    return nn.Sequential(Normalize(mean, std), net)


def divide(pair: tuple[Tensor, ...], size: int, seed: int) -> tuple[Pair, Pair]:
    """Trusted images, and those that are reported on."""
    order = torch.randperm(len(pair[0]), generator=torch.Generator().manual_seed(seed))
    parts = [(pair[0][part], pair[1][part]) for part in (order[:size], order[size:])]
    return parts[0], parts[1]
