"""The data that an attacker holds, and which of them are to be poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.checks import between, images, labels, whole
from torchfolio.data import Examples
from torchfolio.shown import Shown

__all__ = ["DataConstraint", "labelled_images"]


def labelled_images(data: Any, num_classes: int | None = None, *, unlabelled: bool = False) -> tuple[Tensor, Tensor]:
    """Images `[N, C, H, W]` in [0, 1] and labels `[N]`, in memory, of any kind of data.

    Args:
        data: data of any form that `torchfolio.data.Examples` takes.
        num_classes: number of classes, if it is known.
        unlabelled: whether a label may be -1, for none.

    Raises:
        ValueError: on images outside [0, 1], or labels out of range.
    """
    examples = Examples(data)
    x, y = examples.tensors or (torch.cat(part) for part in zip(*examples.batches(), strict=True))
    return images(x, name="images", unit=True), labels(y.cpu(), num_classes, ignore_index=-1 if unlabelled else None)


@dataclass(frozen=True, eq=False, repr=False)
class DataConstraint(Shown):
    """What of the data the attacker holds; made by `number`, `classes` or `domain`.

    Attributes:
        rate: poisoned examples, as a share of the victim's own training set.
        only: classes that carriers come from; `None` for all but the target.
        foreign: images of another distribution and their labels, -1 where there is none.
    """

    rate: float
    only: tuple[int, ...] | None = None
    foreign: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        between("rate", self.rate, 0, 1)

    @staticmethod
    def number(rate: float) -> DataConstraint:
        """A few examples, drawn from all classes but the target."""
        return DataConstraint(rate)

    @staticmethod
    def classes(only: Sequence[int], rate: float) -> DataConstraint:
        """Examples of some classes alone: of the target, which keep their label, or of others."""
        chosen = tuple(whole("class", c, 0) for c in only)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"expected classes, each once, got {list(only)}")
        return DataConstraint(rate, only=chosen)

    @staticmethod
    def domain(data: Any, rate: float) -> DataConstraint:
        """Images of another distribution: a tensor `[N, C, H, W]` in [0, 1], or anything with labels."""
        if isinstance(data, Tensor):
            data = data, torch.full((len(data),), -1)
        x, y = labelled_images(data, unlabelled=True)
        return DataConstraint(rate, foreign=(images(x, unit=True), y))

    def carriers(self, y: np.ndarray, target: int, seed: int) -> np.ndarray:
        """Which examples are to carry the trigger, in order.

        Args:
            y: labels `[N]` of the victim's training set.
            target: class that triggered examples are to be taken for.
            seed: seed of the choice.

        Returns:
            Indices into the training set; into the foreign images under `domain`.

        Raises:
            ValueError: if there are fewer examples than `rate` asks for.
        """
        if self.foreign is not None:
            pool = np.arange(len(self.foreign[1]))
        elif self.only is None:
            pool = np.flatnonzero(y != target)
        else:
            pool = np.flatnonzero(np.isin(y, self.only))
        number = round(self.rate * len(y))
        if number > len(pool):
            raise ValueError(
                f"expected at most {len(pool)} poisoned examples, as many as the attacker holds, got a rate of "
                f"{self.rate} of {len(y)}, which are {number}"
            )
        return np.sort(np.random.default_rng(seed).choice(pool, number, replace=False))
