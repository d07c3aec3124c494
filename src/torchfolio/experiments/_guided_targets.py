"""Networks that overfit or do not train, trained plainly or under a residual network as guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import FitResult, evaluate
from torchfolio.engine.recipes import adam, cosine
from torchfolio.models import MLP, VGG, ResNetCIFAR
from torchfolio.runs import Run
from torchfolio.runs.tasks import accuracy
from torchfolio.training.guidance import Guidance, GuidedRule

KINDS = ("plain", "untrained", "trained")
"""Ways to train a target: without a guide, by an untrained and by a trained one."""


def wide(run: Run[Any], data: DataSplits) -> nn.Module:
    """The target that overfits: a wide perceptron."""
    return MLP(data.train.tensors[0][0].numel(), data.num_classes, run.settings.hidden, norm="batch")


def deep_perceptron(run: Run[Any], data: DataSplits) -> nn.Module:
    """A perceptron of many layers."""
    hidden = (256,) * run.settings.deep_layers
    return MLP(data.train.tensors[0][0].numel(), data.num_classes, hidden, norm="batch", dropout=0.1)


def no_skips(run: Run[Any], data: DataSplits) -> nn.Module:
    """Convolutional layers in three stages without a skip connection."""
    stages = tuple((width,) * run.settings.stage_layers for width in run.settings.guide_widths)
    return VGG(stages, data.num_classes, data.shape[0])


def residual(run: Run[Any], data: DataSplits) -> nn.Module:
    """The guide: a small residual network."""
    return ResNetCIFAR(8, run.settings.guide_widths, data.num_classes, data.shape[0], shortcut="B")


# Its stem, the convolutions of its three blocks, its pooled features; not the shortcuts.
GUIDE_LAYERS = ("stem.0", *(f"block{k}.conv{c}" for k in (1, 2, 3) for c in (1, 2)), "head.0")


def shuffled(seed: int) -> Callable[[Tensor], Tensor]:
    """The same examples in another order, drawn anew for every batch: a guide that looks at the wrong ones."""
    draws = torch.Generator().manual_seed(seed)
    return lambda x: x[torch.randperm(len(x), generator=draws).to(x.device)]


def learn(
    run: Run[Any], data: DataSplits, make: Callable[..., nn.Module], kind: str, *, alpha: float = 1.0, **options: Any
) -> dict[str, Any]:
    """Train a target in one of the ways of `KINDS`; scores, and what is left of the alignment of every pair."""
    settings = run.settings
    net = make(run, data)  # first, so that every arm starts from the same weights
    rule, outcome = None, {}
    if kind != "plain":
        guide = residual(run, data)
        if kind == "trained":
            own = {"epochs": settings.guide_epochs, "batch_size": settings.guide_batch_size, "scheduler": cosine()}
            _fit(run, data, guide, settings.guide_lr, **own)
            outcome["guide_accuracy"] = accuracy(guide, data.test)
        rule = GuidedRule(Guidance(net, guide, layers=GUIDE_LAYERS, alpha=alpha, **options))
    result = _fit(run, data, net, settings.lr, rule=rule, epochs=settings.epochs, batch_size=settings.batch_size)
    test, val = evaluate(net, data.test), evaluate(net, data.val)
    outcome |= {
        "accuracy": 100 * test["accuracy"], "loss": test["loss"], "val_accuracy": 100 * val["accuracy"],
        "val_loss": val["loss"], "train_accuracy": accuracy(net, data.train),
        "val_losses": result.history.to_frame()["val_loss"].tolist(),
    }  # fmt: skip
    if rule is not None:
        outcome["alignment"] = [value.item() for value in rule.guidance.per_layer.values()]
    return outcome


def _fit(run: Run[Any], data: DataSplits, net: nn.Module, lr: float, **options: Any) -> FitResult:
    """Train by Adam, with losses on validation images."""
    return run.fit(net, data.train, val=data.val, optimizer=adam(lr), drop_last=True, **options)
