"""The common task of experiments: a data set, a budget, and one training by any rule.

The same seed gives every arm the same examples, and the same order of batches. Experiments whose networks may be anybody's
have settings of `OwnNetwork`: `torchfolio run SLUG --set model=package.module:factory --set data=folder/` measures the claims
on a network and on data of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchfolio.data import CropFlip, DataSplits
from torchfolio.engine import LearningRule, evaluate, fit
from torchfolio.engine.recipes import one_cycle, sgd
from torchfolio.fitting import fitting_network
from torchfolio.runs.run import Run

__all__ = ["SMOKE", "Images", "OwnNetwork", "Task", "accuracy", "load", "own_network", "train"]


@dataclass(frozen=True)
class OwnNetwork:
    """Settings of an experiment that may be measured on any network.

    Attributes:
        model: reference network or `package.module:factory` in place of the experiment's own; `None` takes that.
    """

    model: str | None = None


def own_network(settings: OwnNetwork, data: DataSplits, make: Callable[[], nn.Module]) -> nn.Module:
    """The user's network with random weights where the settings name one, else what `make` returns."""
    return make() if settings.model is None else fitting_network(settings.model, data)


@dataclass(frozen=True)
class Images:
    """Data alone.

    Attributes:
        data: name of the data set.
        train_size: training examples; `None` takes all.
        test_size: test examples; `None` takes all.
        val_size: examples held out of the training part.
        image_size: images are box-downsampled to this side; `None` keeps them.
    """

    data: str = "cifar10"
    train_size: int | None = 6000
    test_size: int | None = 2000
    val_size: int = 1000
    image_size: int | None = 16


@dataclass(frozen=True)
class Task(Images):
    """Data and budget.

    Attributes:
        epochs: passes over the training examples.
        batch_size: examples of a batch.
        lr: peak of the one-cycle learning rate.
        momentum: Nesterov momentum.
        weight_decay: weight decay of all trained weights.
        crop: pixels of padding before a random crop; flips are always on for photographs.
    """

    epochs: int = 8
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    crop: int = 0


SMOKE: dict[str, Any] = {"data": "digits", "train_size": 512, "test_size": None, "val_size": 100, "image_size": None}
"""Embedded data in place of a task's own."""


def load(run: Run[Any], **changes: Any) -> DataSplits:
    """The task's data, with `changes` to the arguments of `torchfolio.data.load`."""
    task: Images = run.settings
    own = {"train_size": task.train_size, "test_size": task.test_size, "val": task.val_size}
    return run.data(task.data, **{**own, "image_size": task.image_size, **changes})


def accuracy(net: nn.Module, data: Any, rule: LearningRule | None = None) -> float:
    """Accuracy in percent.

    Args:
        net: network.
        data: examples with labels, as `torchfolio.engine.evaluate` takes them.
        rule: learning rule, where the network answers in a way of its own.
    """
    return 100 * evaluate(net, data, rule=rule)["accuracy"]


def train(
    task: Task,
    data: DataSplits,
    net: nn.Module,
    rule: LearningRule | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> dict[str, float]:
    """Train a network in place by the task's budget: SGD, one cycle.

    Args:
        task: an experiment's settings.
        data: data of `load`.
        net: network.
        rule: learning rule; backprop by default.
        seed: seed of the run.
        device: device of the run.
        **changes: arguments of `torchfolio.engine.fit` that take the place of the task's.

    Returns:
        Test loss, steps; test and validation accuracy in percent where there are labels.
    """
    photographs = len(data.shape) == 3 and data.shape[0] == 3
    own: dict[str, Any] = {
        "val": data.val,
        "optimizer": sgd(task.lr, task.momentum, task.weight_decay),
        "scheduler": one_cycle(),
        "epochs": task.epochs,
        "batch_size": task.batch_size,
        "augment": CropFlip(padding=task.crop, flip=True) if photographs else None,
        "seed": seed,
        "device": device,
        # Rules for sequences say themselves how their network is run.
        "evaluate": getattr(rule, "evaluate", None),
    }
    result = fit(net, data.train, rule=rule, **{**own, **changes})
    score = getattr(rule, "evaluate", evaluate)
    test, val = score(net, data.test), score(net, data.val)
    scores = {"loss": test["loss"], "steps": float(result.steps)}
    if "accuracy" in test:
        scores |= {"accuracy": 100 * test["accuracy"], "val_accuracy": 100 * val["accuracy"]}
    return scores
