"""A training step of a ResNet-20 with and without noise, and the noise beside a draw for every parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchfolio.engine.recipes import sgd
from torchfolio.models import resnet20
from torchfolio.runs.bench import Bench, training_step
from torchfolio.training.gradient_noise import GradientNoise


def peers(bench: Bench) -> None:
    batch = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))

    def noisy(parameters: Any) -> torch.optim.Optimizer:
        optimizer = sgd(1e-3, momentum=0)(parameters)
        GradientNoise(optimizer, 0.01)
        return optimizer

    steps = {"ours": noisy, "without_noise": sgd(1e-3, momentum=0)}
    calls: Any = {name: training_step(resnet20(), batch, optimizer=factory) for name, factory in steps.items()}
    bench.compare("step of a ResNet-20, 32 images of 32x32", repeats=9, **calls)
    net = nn.Sequential(*(nn.Linear(50, 50) for _ in range(20)))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    GradientNoise(optimizer, 0.01)
    plain = torch.optim.SGD(net.parameters(), lr=0.0)

    def naive() -> None:
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad + 0.1 * torch.randn_like(p)
        plain.step()

    bench.compare("noise and step, 20 layers of 50x50", ours=optimizer.step, draw_for_every_parameter=naive)
