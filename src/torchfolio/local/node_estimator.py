"""What the algorithms of ForwardGNN ask of the estimator that trains with them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchfolio.local.layerwise import LayerwiseEstimator

__all__ = ["NodeEstimator"]


class NodeEstimator(LayerwiseEstimator):
    """Estimator of classes of nodes, with a virtual node for each class.

    Attributes:
        num_classes_: number of classes.
        virtual_: features of the virtual nodes, `[classes, F]`.
    """

    temperature: float
    n_negatives: int
    alternating: bool
    num_classes_: int
    virtual_: Tensor

    def _linked_classes(self, y: Tensor) -> Tensor:
        """Class whose virtual node each training node is linked to: its own."""
        return y

    def _negatives(self, y: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Wrong labels `[N]`, one tensor a negative graph: for each node, a random order of the other classes."""
        key = torch.rand(len(y), self.num_classes_, generator=generator).to(y.device)
        order = key.scatter(1, y.clamp(min=0)[:, None], 2.0).argsort(1)
        return list(order[:, : min(self.n_negatives, self.num_classes_ - 1)].unbind(1))
