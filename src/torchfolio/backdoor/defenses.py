"""What is done before there is a backdoor: `TrainingDefense` trains without one, `Attack` plants one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import nn
from torch.utils.data import Dataset

from torchfolio.backdoor.labels import LabelMap
from torchfolio.backdoor.poison import poison
from torchfolio.backdoor.poisoned_dataset import PoisonedDataset
from torchfolio.shown import Shown

__all__ = ["Attack", "TrainingDefense"]


class TrainingDefense(Shown, ABC):
    """Makes training on data that may be poisoned safe."""

    @abstractmethod
    def prepare(self, dataset: Any, *, clean: Any = None, seed: int = 0) -> Dataset:
        """The data to train on.

        Args:
            dataset: training data that may be poisoned.
            clean: examples that can be trusted, where the method takes some.
            seed: seed of whatever is drawn; global generators are left where they were.
        """

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network to deploy, around the one that was trained; that one itself unless the method says otherwise."""
        return model


class Attack(Shown, ABC):
    """Makes a trigger, and data poisoned by it. A method fills `fit`, which sets `trigger` and `labels`.

    Attributes:
        trigger: function from images in [0, 1] to such.
        labels: labels that triggered samples get.
        rate: share of the training set that `poison` takes.
    """

    trigger: nn.Module
    labels: LabelMap
    rate: float = 0.1

    @abstractmethod
    def fit(self, *args: Any, **kwargs: Any) -> Self:
        """Make the trigger; whatever network it is made with is left as it is."""

    def poison(self, dataset: Any, seed: int) -> PoisonedDataset:
        """The training set with the trigger in a share `rate` of it, see `torchfolio.backdoor.poison`."""
        if getattr(self, "trigger", None) is None:
            raise RuntimeError("call fit first, which makes the trigger")
        return poison(dataset, self.trigger, self.labels, rate=self.rate, seed=seed)
