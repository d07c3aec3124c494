"""Small networks and one way to train them, for experiments on backdoors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from torchfolio.backdoor.poisoned_dataset import PoisonedDataset
from torchfolio.engine import FitResult, LearningRule, fit
from torchfolio.models import BasicBlock
from torchfolio.shown import Shown

__all__ = ["Cutout", "Normalize", "ResNet18CIFAR", "SmallConvNet", "fit_classifier"]


class Normalize(nn.Module):
    """$(x - \\mu) / \\sigma$ per channel, the first layer of a network whose inputs are images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or any(not s > 0 for s in std):
            raise ValueError(f"expected as many means as positive deviations, got {list(mean)} and {list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class SmallConvNet(nn.Sequential):
    """Five 3x3 convolutions of widths w, 2w, 2w, 4w, 4w with batch norm, pooled; the second and fourth halve the side.

    Args:
        in_ch: channels of the images.
        num_classes: width of the output.
        width: $w$.

    Shapes:
        `[B, in_ch, H, W]` to `[B, num_classes]`; `features` gives `[B, 4w]`.
    """

    def __init__(self, in_ch: int, num_classes: int, width: int = 16) -> None:
        plan = [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1)]
        children: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_ch
        for k, (factor, stride) in enumerate(plan, start=1):
            conv = nn.Conv2d(channels, factor * width, 3, stride, 1, bias=False)
            children[f"layer{k}"] = nn.Sequential(conv, nn.BatchNorm2d(factor * width), nn.ReLU())
            channels = factor * width
        children["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        children["head"] = nn.Linear(channels, num_classes)
        super().__init__(children)

    def features(self, x: Tensor) -> Tensor:
        """The inputs of the head, `[B, 4w]`."""
        return nn.Sequential(*list(self.children())[:-1])(x)


class ResNet18CIFAR(nn.Sequential):
    """ResNet-18 for small images: a 3x3 stem, four stages of two blocks with projections, a pooled linear head.

    Args:
        in_ch: channels of the images.
        num_classes: width of the output.
        width: channels of the first stage, doubled by each of the others.
    """

    def __init__(self, in_ch: int = 3, num_classes: int = 10, width: int = 64) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        conv = nn.Conv2d(in_ch, width, 3, 1, 1, bias=False)
        children["stem"] = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        channels = width
        for stage in range(4):
            for k in range(2):
                wanted = width * 2**stage
                children[f"block{2 * stage + k + 1}"] = BasicBlock(channels, wanted, 2 if stage and not k else 1, "B")
                channels = wanted
        children["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        children["head"] = nn.Linear(channels, num_classes)
        super().__init__(children)

    def features(self, x: Tensor) -> Tensor:
        """The inputs of the head, `[B, 8 width]`."""
        return nn.Sequential(*list(self.children())[:-1])(x)


class Cutout(Shown):
    """Set a square at a random place of every image to `value`.

    Args:
        size: side of the square; it may reach over the border.
        value: value of its pixels.

    Reference:
        DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """

    def __init__(self, size: int = 3, value: float = 0.0) -> None:
        self.size, self.value = size, value

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        inside = []
        for side in (height, width):
            start = torch.randint(side, (batch, 1), device=x.device) - self.size // 2
            place = torch.arange(side, device=x.device)
            inside.append((place >= start) & (place < start + self.size))
        return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], self.value)


def fit_classifier(
    model: nn.Module,
    data: Any,
    epochs: int,
    lr: float = 0.05,
    *,
    optimizer: Literal["sgd", "adam"] = "sgd",
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle",
    augment: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    rule: LearningRule | None = None,
    seed: int = 0,
    **settings: Any,
) -> FitResult:
    """Train a classifier in place, by `torchfolio.engine.fit` with the settings usual here.

    Args:
        model: network.
        data: a `PoisonedDataset` (read at once, as tensors), or what `fit` takes.
        epochs: passes over it.
        lr: peak of the learning rate.
        optimizer: SGD with Nesterov momentum 0.9, or Adam.
        schedule: schedule of the learning rate.
        augment: function from batches of images to such.
        batch_size: batch size of the training.
        weight_decay: weight decay of the optimizer.
        rule: learning rule; backprop by default.
        seed: seed of order and augmentation.
        **settings: settings of `fit`: `device`, `callbacks`, …
    """
    if isinstance(data, PoisonedDataset) and data.transform is None:
        data = data.tensors()
    size = len(data[0] if isinstance(data, list | tuple) else data)
    steps = max(1, epochs * -(-size // batch_size))
    kinds = {
        "sgd": partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay),
        "adam": partial(torch.optim.Adam, lr=lr, weight_decay=weight_decay),
    }
    schedules = {
        "onecycle": partial(OneCycleLR, max_lr=lr, total_steps=steps, cycle_momentum=False),
        "cosine": partial(CosineAnnealingLR, T_max=steps),
        "constant": None,
    }
    if optimizer not in kinds or schedule not in schedules:
        raise ValueError(
            f"expected optimizer sgd or adam and schedule onecycle, cosine or constant, got {optimizer!r}, {schedule!r}"
        )
    return fit(
        model, data, rule=rule, optimizer=kinds[optimizer], scheduler=schedules[schedule], epochs=epochs,
        batch_size=batch_size, augment=augment, seed=seed, **{"progress": False, **settings},
    )  # fmt: skip
