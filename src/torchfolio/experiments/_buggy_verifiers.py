"""Verifiers with planted bugs, each of a severity: what is left of the truth, where 1 is no bug."""

from __future__ import annotations

import torch
from torch import Tensor

from torchfolio.robustness.properties import Box
from torchfolio.robustness.verifiers import CrownSplit


class ShrinkInput(CrownSplit):
    """A bug: looks at a box shrunk by a factor around its centre."""

    def __init__(self, severity: float) -> None:
        super().__init__(attack_steps=0)
        self.severity = severity

    def shrink(self, box: Box) -> Box:
        return Box(box.center - self.severity * box.radius, box.center + self.severity * box.radius)


class ShrinkIntermediate(CrownSplit):
    """A bug: contracts the bounds of the inputs of activations towards their centres."""

    def __init__(self, severity: float) -> None:
        super().__init__(attack_steps=0)
        self.severity = severity

    def adjust(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        center, radius = (low + high) / 2, self.severity * (high - low) / 2
        return center - radius, center + radius


class DropDomains(CrownSplit):
    """A bug: forgets each half of a split box with a probability of one less the severity's value."""

    def __init__(self, severity: float) -> None:
        super().__init__(attack_steps=0)
        self.severity, self.generator = severity, torch.Generator().manual_seed(0)

    def keep(self, boxes: Box) -> Tensor:
        return torch.rand(len(boxes), generator=self.generator) < self.severity


BUGS = {"shrink_input": ShrinkInput, "shrink_intermediate": ShrinkIntermediate, "drop_domains": DropDomains}
