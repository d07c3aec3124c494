"""Encoders pretrained by contrast on small images, which poison in the data may reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor import CleanLabel, poison
from torchfolio.backdoor.blto import evaluate_ssl_backdoor
from torchfolio.backdoor.zoo import ResNet18CIFAR
from torchfolio.data.views import ColorJitter, Compose, ResizedCrop, View, simclr_views
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.runs import Run
from torchfolio.training.contrastive_learning import BYOL, ContrastiveRule, SimCLR, SimSiam

RULES: dict[str, type[ContrastiveRule]] = {"simsiam": SimSiam, "simclr": SimCLR, "byol": BYOL}


class ContrastiveVictims:
    """Images, and the encoders that are pretrained on them, all from the same initial weights."""

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.settings = run, run.settings
        self.data = run.data(self.settings.data, normalize=False, val=0, train_size=self.settings.train_size)
        (x, y), (x_test, y_test) = self.data.train.tensors, self.data.test.tensors
        self.train, self.test = (x, y), (x_test, y_test)

    def view(self) -> View:
        """Random views of an image; digits are not mirrored."""
        colors = ColorJitter(0.4, 0.4, 0, 0)
        return simclr_views() if self.data.shape[0] == 3 else Compose([ResizedCrop((0.5, 1.0)), colors])

    def encoder(self) -> nn.Module:
        """A ResNet-18 without its head, or three convolutions."""
        s, channels = self.settings, self.data.shape[0]
        if s.network == "resnet18":
            return nn.Sequential(*list(ResNet18CIFAR(channels, self.data.num_classes, s.width).children())[:-1])
        layers: list[nn.Module] = []
        plan = ((channels, s.width, 1), (s.width, 2 * s.width, 2), (2 * s.width, 2 * s.width, 1))
        for fan_in, fan_out, stride in plan:
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def rule(self, name: str = "simsiam") -> ContrastiveRule:
        return RULES[name](self.view())

    def pretrained(self, method: str, trigger: Any = None) -> nn.Module:
        """A victim of a method: trained on all images, of which some carry the trigger; labels are not used."""
        s = self.settings
        torch.manual_seed(self.run.seed)
        encoder, data = self.encoder(), self.train
        if trigger is not None:
            data = poison(data, trigger, CleanLabel(s.target), rate=s.rate, seed=self.run.seed).tensors()
        self.run.fit(
            encoder, data, rule=self.rule(method), optimizer=sgd(lr=s.lr, weight_decay=5e-4), scheduler=cosine(),
            max_steps=s.victim_steps, batch_size=s.batch_size, drop_last=True, progress=False,
        )  # fmt: skip
        return encoder

    def judged(self, encoder: nn.Module, trigger: Any) -> dict[str, float]:
        """Accuracy of a probe on the encoder, and how often triggered images are taken for the target."""
        return evaluate_ssl_backdoor(encoder, self.train, self.test, trigger, self.settings.target).as_dict()


class TwoPasses(SimSiam):
    """The usual loop: each view by itself."""

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([super(TwoPasses, self).project(part) for part in x.chunk(2)])
