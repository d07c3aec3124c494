"""A step of pretraining with both views in one pass, and view by view."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor.zoo import ResNet18CIFAR
from torchfolio.engine import LearningRule
from torchfolio.experiments._contrastive_victims import TwoPasses
from torchfolio.training.contrastive_learning import SimSiam


def peers(bench: Any) -> None:

    def step(rule: LearningRule, encoder: nn.Module, x: Tensor) -> Any:
        rule.prepare(encoder, (x[:2], x[:2]))
        return lambda: rule.step((x, x), lambda loss: loss.backward())

    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    resnet = nn.Sequential(*list(ResNet18CIFAR(3, 10, 8).children())[:-1])
    for work, encoder, shape in (
        ("one convolution, 128 images 8x8", small, (1, 8, 8)),
        ("ResNet-18 of width 8, 128 images 32x32", resnet, (3, 32, 32)),
    ):
        x = torch.rand(128, *shape)
        rules = {"ours": SimSiam(), "two_passes": TwoPasses()}
        bench.compare(
            f"SimSiam, {work}",
            repeats=5,
            **{name: step(rule, copy.deepcopy(encoder), x) for name, rule in rules.items()},
        )
