"""Training of detectors on examples with weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import LearningRule

__all__ = ["WeightedRule", "detector_weights", "weighted_loss"]


class WeightedRule(LearningRule):
    """Binary cross-entropy of examples with weights."""

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        self.model = model
        return model

    def step(self, batch: Sequence[Tensor], backward: Any) -> dict[str, Tensor]:
        loss = cross_entropy(self.model, *batch)
        backward(loss)
        return {"loss": loss.detach()}


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(x)[:, 0], y, weight)


@torch.no_grad()
def weighted_loss(model: nn.Module, data: Any) -> dict[str, float]:
    """Mean loss of a network over examples, each with its weight."""
    place = next(model.parameters()).device
    tensors = data.tensors if hasattr(data, "tensors") else data
    return {"loss": float(cross_entropy(model, *(t.to(place) for t in tensors)))}


def detector_weights(codes: np.ndarray, sjr: Any) -> Tensor:
    """Mean 1, both labels of equal weight; jammed examples by the rarity of their band."""
    weight = np.ones(len(codes))
    if sjr is not None:
        sjr = np.asarray(sjr, dtype=float)
        if sjr.shape != codes.shape:
            raise ValueError(f"expected a ratio for each of {len(codes)} examples, got shape {sjr.shape}")
        jammed = codes == 1
        if not np.isfinite(sjr[jammed]).all():
            raise ValueError("expected finite ratios of jammed examples")
        _, band, count = np.unique(sjr[jammed] // 5, return_inverse=True, return_counts=True)
        weight[jammed] = 1 / count[band]
    for code in (0, 1):
        weight[codes == code] *= len(codes) / 2 / weight[codes == code].sum()
    return torch.from_numpy(weight).float()
