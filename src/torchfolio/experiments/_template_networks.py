"""Wide residual networks in templates, their training, and growth whose new entries are out of order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from torchfolio.efficiency.mixture_growth import GrowableModel, TemplateLayer, param_groups, templatize
from torchfolio.engine import StepRecorder, seeded
from torchfolio.engine.recipes import one_cycle
from torchfolio.experiments._wide_resnet import wide_resnet
from torchfolio.runs import Run
from torchfolio.runs.tasks import accuracy, load, train

__all__ = ["TemplateNetworks", "shuffle_added"]


class TemplateNetworks:
    """Data of one seed, and networks for them."""

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.settings, self.data = run, run.settings, load(run)
        self.example = self.data.train.tensors[0][:2]

    def wide(self) -> nn.Sequential:
        """The network of full width."""
        return wide_resnet(self.data.shape[0], self.data.num_classes, self.settings.width, self.settings.blocks)

    def growable(self, members: Mapping[str, Any] | None = None) -> GrowableModel:
        """The network in templates, as the seed draws it, or with the stored weights of trained members."""
        with seeded(self.run.seed):
            model = templatize(self.wide(), self.example, self.settings.templates)
        if members is not None:
            weights = {name: tensor for name, tensor in members.items() if name.startswith("weights.")}
            model.load_state_dict({name.removeprefix("weights."): tensor for name, tensor in weights.items()})
        return model.to(self.run.device)

    def fitted(self, net: nn.Module, epochs: int, lr: float) -> dict[str, Any]:
        """Train one network: its test accuracy, and validation accuracy by epoch."""
        s, run, data = self.settings, self.run, self.data
        course = StepRecorder(
            {"accuracy": lambda state: accuracy(net, data.val)}, every=ceil(len(data.train) / s.batch_size)
        )
        optimizer = SGD(param_groups(net.to(run.device), s.weight_decay), lr=lr, momentum=s.momentum, nesterov=True)
        how: dict[str, Any] = {"optimizer": optimizer, "scheduler": one_cycle(lr), "callbacks": [course]}
        scores = train(replace(s, epochs=epochs), data, net, seed=run.seed, device=run.device, **how)
        return {"accuracy": scores["accuracy"], "curve": [row["accuracy"] for row in course.rows if row["step"]]}


def shuffle_added(model: GrowableModel, net: nn.Module, seed: int) -> None:
    """The negative control: the entries of every added block in random order, so that only their sizes stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.net.named_modules():
        if isinstance(layer, TemplateLayer) and layer.blocks == 4:
            w0, w1, *added = (block.detach() for block in layer.mixtures())
            mixed = [w.flatten()[torch.randperm(w.numel(), generator=generator)].view_as(w) for w in added]
            net.get_submodule(name).weight.data.copy_(layer.join(w0, w1, *mixed))  # pyright: ignore
