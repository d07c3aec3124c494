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
from torchfolio.runs.settings import setting

__all__ = ["SMOKE", "Images", "OwnNetwork", "Task", "accuracy", "load", "own_network", "train"]


@dataclass(frozen=True)
class OwnNetwork:
    """Settings of an experiment that may be measured on any network."""

    model: str | None = setting(
        None, "reference network or `package.module:factory` in place of the experiment's own; `None` takes that"
    )


def own_network(settings: OwnNetwork, data: DataSplits, make: Callable[[], nn.Module]) -> nn.Module:
    """The user's network with random weights where the settings name one, else what `make` returns."""
    return make() if settings.model is None else fitting_network(settings.model, data)


@dataclass(frozen=True)
class Images:
    """Data alone."""

    data: str = setting("cifar10", "name of the data set")
    train_size: int | None = setting(6000, "training examples; `None` takes all")
    test_size: int | None = setting(2000, "test examples; `None` takes all")
    val_size: int = setting(1000, "examples held out of the training part")
    image_size: int | None = setting(16, "images are box-downsampled to this side; `None` keeps them")


@dataclass(frozen=True)
class Task(Images):
    """Data and budget."""

    epochs: int = setting(8, "passes over the training examples")
    batch_size: int = setting(128, "examples of a batch")
    lr: float = setting(0.1, "peak of the one-cycle learning rate")
    momentum: float = setting(0.9, "Nesterov momentum")
    weight_decay: float = setting(1e-4, "weight decay of all trained weights")
    crop: int = setting(0, "pixels of padding before a random crop; flips are always on for photographs")


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
