"""A denoiser of five of ten classes that learns the others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.dynamics.diffusion import MLPDenoiser, NoisePrediction, train_diffusion
from torchfolio.dynamics.noise_schedules import DiscreteSchedule
from torchfolio.engine.recipes import adamw
from torchfolio.models import parameter_count
from torchfolio.runs import Run

__all__ = ["HalfDenoiser", "schedule"]


def schedule(steps: int) -> DiscreteSchedule:
    """The diffusion's noise: variances that rise in a line."""
    return DiscreteSchedule.linear(steps, 1e-4, 0.05)


class HalfDenoiser:
    """A denoiser trained on the first five classes, images of the others, and held-out images of both."""

    def __init__(self, run: Run[Any]) -> None:
        self.settings = s = run.settings
        self.seed, self.schedule = run.seed, schedule(s.noise_steps)
        data = run.data(s.data, normalize=False, val=0)
        first, second = half(data, 0), half(data, 5)
        self.x, self.held = second[0][: s.tune_size], (first[1], second[1])
        torch.manual_seed(run.seed)
        self.net = MLPDenoiser(tuple(data.shape), s.hidden, s.depth)
        state = run.arm("pretrained", self.pretrained, first[0][: s.pretrain_size])["state"]
        self.net.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})

    def pretrained(self, x: Tensor) -> dict[str, Any]:
        """The state of a copy of the network that was trained on images."""
        s, net = self.settings, copy.deepcopy(self.net)
        self.train(net, x, steps=s.pretrain_steps, lr=2e-3)
        return {"state": {name: value.clone() for name, value in net.state_dict().items()}}

    def train(self, net: nn.Module, x: Tensor, **how: Any) -> None:
        """Train a network on images in place."""
        own = {"batch_size": self.settings.batch_size, "seed": self.seed, "progress": False}
        train_diffusion(net, x, schedule=self.schedule, **own, **how)

    def tuned(self, net: nn.Module, optimizer: Any = None) -> dict[str, float]:
        """Losses of a network once it has learned the other classes, by AdamW on all it trains by default."""
        s = self.settings
        self.train(net, self.x, steps=s.tune_steps, lr=s.lr, optimizer=optimizer or adamw(s.lr))
        prior, target = self.losses(net)
        return {"prior": prior, "target": target, "trained": parameter_count(net)}

    def losses(self, net: nn.Module) -> tuple[float, float]:
        """Held-out losses on the first and on the other classes, at fixed times and noise."""
        measure, repeats = NoisePrediction(self.schedule), self.settings.repeats
        prior, target = (measure.evaluate(net, (x, torch.zeros(len(x))), repeats=repeats, seed=7) for x in self.held)
        return prior["loss"], target["loss"]


def half(data: DataSplits, low: int) -> tuple[Tensor, Tensor]:
    """Training and held-out images of the five classes from `low` on, in [-1, 1]."""
    parts = []
    for part in (data.train, data.test):
        x, y = part.tensors
        parts.append(2 * x[(y >= low) & (y < low + 5)] - 1)
    return parts[0], parts[1]
