"""Small convolutional networks that are trained on the first classes of a data set and probed on the others."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import Any

from torch import nn

from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._new_classes import probe, split_classes
from torchfolio.models.conv_net import conv_block
from torchfolio.runs import Run
from torchfolio.training.episodes import train_episodes

__all__ = ["SourceNetworks", "network", "trunk"]


def trunk(channels: int, width: int) -> nn.Module:
    """Three convolutions with batch norm, the pooled features of the last."""
    return nn.Sequential(
        conv_block(channels, width), nn.MaxPool2d(2), conv_block(width, 2 * width), nn.MaxPool2d(2),
        conv_block(2 * width, 2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def network(body: nn.Module, width: int, classes: int) -> nn.Module:
    """A trunk and a linear head."""
    return nn.Sequential(OrderedDict(trunk=body, head=nn.Linear(width, classes)))


class SourceNetworks:
    """Data of one seed, and networks for the source classes."""

    def __init__(self, run: Run[Any]) -> None:
        self.run, self.settings = run, run.settings
        s = run.settings
        data = run.data(s.data, image_size=s.image_size, train_size=s.train_size, val=s.val_size)
        self.source, self.target = split_classes(data, s.source)
        self.channels = self.source["train"][0].shape[1]

    def build(self, width: int | None = None) -> nn.Module:
        """A fresh network for the source classes."""
        channels = self.settings.width if width is None else width
        return network(trunk(self.channels, channels), 2 * channels, self.settings.source)

    def train(self, net: nn.Module, seed: int, epochs: int | None = None, **options: Any) -> None:
        """The source task: SGD with Nesterov momentum, half a cosine."""
        own = {"optimizer": sgd(0.1, 0.9, 5e-4), "scheduler": cosine(), "batch_size": 128, "seed": seed}
        self.run.fit(net, self.source["train"], epochs=epochs or self.settings.epochs, **{**own, **options})

    def probe(self, features: nn.Module) -> dict[str, float]:
        """Accuracy on the new classes by features."""
        return probe(features, self.target, draws=self.settings.draws, seed=self.run.seed)

    @cached_property
    def models(self) -> list[nn.Module]:
        """The networks of all episodes; they are trained when they are first asked for."""
        return train_episodes(self.build, self.train, [1000 * self.run.seed + k for k in range(self.settings.episodes)])
