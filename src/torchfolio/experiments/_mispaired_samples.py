"""The control of comparisons of units: activities of one network beside those of another on other samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from torchfolio.insight.activations import unit_rows
from torchfolio.insight.convergent_learning import bipartite_match, correlation_blocks, sparse_prediction

__all__ = ["mispaired"]


def mispaired(features: Sequence[Tensor], most: int, generator: torch.Generator) -> tuple[float, float]:
    """Mean correlation of matched units, and held-out loss of their prediction from each other; means over all pairs.

    Args:
        features: activities of one layer of each network, `[N, units]` or `[N, units, H, W]`.
        most: largest number of samples and places.
        generator: generator of their order.
    """
    matches, losses = [], []
    for a, b in combinations([unit_rows(layer).flatten(0, 1) for layer in features], 2):
        kept = torch.randperm(len(a), generator=generator)[:most]
        broken = kept[torch.randperm(len(kept), generator=generator)]
        blocks = correlation_blocks(a[kept], b[broken])
        matches.append(bipartite_match(blocks.between).mean)
        losses.append(float(sparse_prediction(blocks, [3e-2]).curve()["loss"].iloc[0]))
    return float(np.mean(matches)), float(np.mean(losses))
