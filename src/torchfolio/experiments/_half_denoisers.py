"""A denoiser of five of ten classes, and its losses on images it has not seen."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.dynamics.diffusion import NoisePrediction, train_diffusion
from torchfolio.dynamics.noise_schedules import DiscreteSchedule

__all__ = ["half", "held_out_losses", "pretrained"]


def half(data: DataSplits, low: int) -> tuple[Tensor, Tensor]:
    """Training and held-out images of the five classes from `low` on, in [-1, 1]."""
    parts = []
    for part in (data.train, data.test):
        x, y = part.tensors
        parts.append(2 * x[(y >= low) & (y < low + 5)] - 1)
    return parts[0], parts[1]


def pretrained(
    net: nn.Module, x: Tensor, schedule: DiscreteSchedule, *, steps: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """The state of a copy of the network that was trained on images."""
    net = copy.deepcopy(net)
    train_diffusion(net, x, schedule=schedule, steps=steps, batch_size=batch_size, lr=2e-3, seed=seed, progress=False)
    return {"state": {name: value.clone() for name, value in net.state_dict().items()}}


def held_out_losses(net: nn.Module, x: Tensor, schedule: DiscreteSchedule, repeats: int) -> float:
    """Loss on images at fixed times and noise, `repeats` draws for each."""
    return NoisePrediction(schedule).evaluate(net, (x, torch.zeros(len(x))), repeats=repeats, seed=7)["loss"]
