"""Forward learning on graphs that is misled: by virtual nodes of other classes, and by negatives with the right labels."""

from __future__ import annotations

import torch
from torch import Tensor

from torchfolio.local.forwardgnn import ForwardGNNClassifier

__all__ = ["EqualNegatives", "NextClass", "RandomClass"]


class NextClass(ForwardGNNClassifier):
    """Training nodes are linked to the virtual node of the next class."""

    def _linked_classes(self, y: Tensor) -> Tensor:
        return torch.where(y < 0, y, (y + 1) % self.num_classes_)


class RandomClass(ForwardGNNClassifier):
    """Training nodes are linked to the virtual node of a random class."""

    def _linked_classes(self, y: Tensor) -> Tensor:
        drawn = torch.randint(self.num_classes_, y.shape, generator=torch.Generator().manual_seed(self.seed))
        return torch.where(y < 0, y, drawn.to(y.device))


class EqualNegatives(ForwardGNNClassifier):
    """The negative graph has the right labels, too."""

    def _negatives(self, y: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [y]
