"""What blank patches of digits do to k-means: some of its centroids come to stand near zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.data import DataSplits
from torchfolio.layers.filter_design import FilterLearner
from torchfolio.layers.filter_learning import KMeans
from torchfolio.runs import Run

__all__ = ["near_zero"]


class Centroids(KMeans):
    """k-means whose centroids keep their length."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        return self.centroids(x, K, generator)


def near_zero(run: Run[Any], data: DataSplits) -> dict[str, int]:
    """Number of centroids near zero (a tenth of the longest), with and without leaving out blank patches."""
    found = {}
    for name, drop in (("dropped", True), ("kept", False)):
        learner = FilterLearner(Centroids(), 8, 5, drop_blank=drop, random_state=run.seed).fit(data.train.tensors[0])
        norms = learner.bank_.filters.flatten(1).norm(dim=1)
        found[name] = int((norms < 0.1 * norms.max()).sum())
    return found
