"""A training step of a member beside a plain network of half the width, and of the grown one beside the target."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from torchfolio.efficiency.mixture_growth import param_groups, templatize
from torchfolio.experiments._wide_resnet import wide_resnet
from torchfolio.experiments.mixture_growth import Settings
from torchfolio.runs.bench import Bench, training_step


def peers(bench: Bench) -> None:
    settings, batch = Settings(), (torch.randn(128, 3, 16, 16), torch.randint(10, (128,)))
    wide: nn.Module = wide_resnet(3, 10, settings.width, settings.blocks)
    model = templatize(wide, batch[0][:2], settings.templates)

    def step(net: nn.Module) -> Any:
        optimizer = SGD(param_groups(net, 5e-4), lr=1e-4, momentum=0.9, nesterov=True)
        return training_step(net, batch, optimizer=optimizer)

    bench.compare("member's step, 128 images of 16x16", ours=step(model.member(0)), half_width=step(model.export(0)),
                  repeats=15)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the second member is not trained here
        model.grow("zero")
    bench.compare("grown step, 128 images of 16x16", ours=step(model), full_width=step(wide))
