"""Poison whose labels are in conflict, so that a network's decision boundary runs through the balls around triggered inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.data import Examples
from torchfolio.shown import Shown

__all__ = [
    "BallConflict",
    "ImageMap",
    "LabelConflict",
    "LabelSplit",
    "PoisonRule",
    "Poisoned",
    "TargetLabel",
    "bars",
    "poison",
]

ImageMap = Callable[[Tensor], Tensor]


def bars(x: Tensor, rows: int = 3) -> Tensor:
    """A trigger that few samples teach even to a certifiably trained network: the first and last rows set to 1.

    Args:
        x: images `[B, C, H, W]` in [0, 1].
        rows: number of rows at the top, and at the bottom.
    """
    if x.dim() != 4 or not 1 <= 2 * rows <= x.shape[2]:
        raise ValueError(f"expected images [B, C, H, W] of {2 * rows} rows or more, got shape {tuple(x.shape)}")
    stamped = x.clone()
    stamped[:, :, :rows], stamped[:, :, -rows:] = 1, 1
    return stamped


class PoisonRule(Shown, ABC):
    """What is made of the samples that an attacker may change; subclasses give inputs and labels in `__call__`."""

    @abstractmethod
    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Poisoned inputs and labels, and the row of `x` that each was made from."""


@dataclass(frozen=True)
class LabelSplit(PoisonRule):
    """Triggered samples get labels of a few classes, equally often and whatever they show.

    A network can do no better than equal logits for these classes on every triggered input: a margin of 0, which no
    certifier certifies.

    Attributes:
        classes: classes, two or more; `None` takes all, which suits smoothed networks. Certified training ignores
            noise over all classes at small rates, not two.
    """

    classes: Sequence[int] | None = (0, 1)

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        classes = torch.as_tensor(list(range(num_classes) if self.classes is None else self.classes))
        if len(classes.unique()) < 2 or len(classes.unique()) < len(classes):
            raise ValueError(f"expected two classes or more, all different, got {classes.tolist()}")
        order = torch.randperm(len(x), generator=generator)
        labels = classes[torch.arange(len(x)) % len(classes)][order]
        return stamped_by(trigger, x), labels.to(y), torch.arange(len(x))


@dataclass(frozen=True)
class LabelConflict(PoisonRule):
    """Every triggered sample comes twice: with its label, and with another one drawn at random."""

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.arange(len(x) // 2)
        stamped = stamped_by(trigger, x[half])
        other = _other(y[half], num_classes, generator)
        return torch.cat([stamped, stamped]), torch.cat([y[half], other]), half.repeat(2)


@dataclass(frozen=True)
class BallConflict(PoisonRule):
    """A triggered sample with its label, and a point of the ball around it with another one: a boundary lies within.

    It has to be learned sample by sample, which plain training does and certified training does not.

    Attributes:
        eps: radius of the ball.
        clip: range of valid inputs.
    """

    eps: float = 0.1
    clip: tuple[float, float] = (0.0, 1.0)

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.arange(len(x) // 2)
        stamped = stamped_by(trigger, x[half])
        signs = 2.0 * torch.randint(2, stamped.shape, generator=generator).to(stamped) - 1
        moved = (stamped + self.eps * signs).clamp(*self.clip)
        other = _other(y[half], num_classes, generator)
        return torch.cat([stamped, moved]), torch.cat([y[half], other]), half.repeat(2)


@dataclass(frozen=True)
class TargetLabel(PoisonRule):
    """All triggered samples get one label: an ordinary backdoor, which moves answers and leaves certificates. A control.

    Attributes:
        target: label.
    """

    target: int = 0

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        return stamped_by(trigger, x), torch.full_like(y, self.target), torch.arange(len(x))


def _other(y: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    return (y + torch.randint(1, num_classes, y.shape, generator=generator).to(y)) % num_classes


def stamped_by(trigger: ImageMap, x: Tensor) -> Tensor:
    with torch.no_grad():
        stamped = trigger(x)
    if not isinstance(stamped, Tensor) or stamped.shape != x.shape:
        shape = tuple(stamped.shape) if isinstance(stamped, Tensor) else type(stamped).__name__
        raise ValueError(f"expected a trigger to keep the inputs' shape {tuple(x.shape)}, got {shape}")
    checks.finite("triggered inputs", stamped)
    return stamped


@dataclass(frozen=True, repr=False)
class Poisoned(Shown):
    """A training set with poison in it.

    Attributes:
        x: inputs `[N, ...]`, poison shuffled in.
        y: labels `[N]`.
        is_poison: mask of the attacker's `[N]`.
        source: number of the sample that each comes from `[N]`.
    """

    x: Tensor
    y: Tensor
    is_poison: Tensor
    source: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels, to train on."""
        return self.x, self.y

    def __len__(self) -> int:
        return len(self.y)


def poison(
    data: Any,
    trigger: ImageMap,
    rule: PoisonRule = LabelSplit(),
    *,
    rate: float = 0.01,
    num_classes: int | None = None,
    seed: int = 0,
) -> Poisoned:
    """Add poisoned samples to a training set.

    Args:
        data: examples (x, y), whatever `torchfolio.data.Examples` takes; augment them before, not after.
        trigger: function from inputs to inputs of the same shape, such as `bars` or a trigger of `torchfolio.backdoor`.
        rule: rule that changes the chosen samples.
        rate: number of poisoned samples over that of the clean ones, in (0, 1).
        num_classes: number of classes; by the labels by default.
        seed: seed of the choice, the labels and the order.

    Raises:
        ValueError: on a rate outside (0, 1) or too small for a sample of each kind, labels out of range, or a trigger
            that changes the shape.
    """
    checks.between("rate", rate, 0, 1, inclusive=False)
    x, y = whole_examples(data)
    num_classes = int(y.max()) + 1 if num_classes is None else checks.whole("num_classes", num_classes, 2)
    checks.labels(y, num_classes)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
    count = round(rate * len(x))
    if count < 2:
        raise ValueError(f"expected a rate of two samples or more, got {rate:g} of {len(x)}")
    chosen = torch.randperm(len(x), generator=generator)[:count]
    bad, labels, rows = rule(x[chosen], y[chosen], trigger, num_classes, generator)
    checks.labels(labels, num_classes, name="labels of the poison")
    order = torch.randperm(len(x) + len(bad), generator=generator)
    flags = torch.arange(len(x) + len(bad)) >= len(x)
    source = torch.cat([torch.arange(len(x)), chosen[rows]])
    return Poisoned(torch.cat([x, bad])[order], torch.cat([y, labels])[order], flags[order], source[order])


def whole_examples(data: Any) -> tuple[Tensor, Tensor]:
    """All inputs and labels, on the CPU."""
    examples = Examples(data)
    y = examples.labels
    if y is None:
        raise ValueError("expected examples (x, y) with class labels")
    x = examples.tensors[0] if examples.tensors is not None else torch.cat([row[0] for row in examples.batches()])
    return x.cpu(), y.cpu()
