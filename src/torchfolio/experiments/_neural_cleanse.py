"""Neural Cleanse, with which methods that draw triggers are compared: its mask and pattern, and its anomaly index.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", S&P 2019.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.backdoor.detectors import private
from torchfolio.backdoor.metrics import labels_of


def mask_and_pattern(model: nn.Module, image: Tensor, others: Tensor, steps: int, weight: float = 0.01) -> float:
    """A mask and a pattern fitted to one image for target 0, and how often they turn others into it."""
    net = private(model, None)
    mask, pattern = (
        torch.full(shape, v, requires_grad=True) for shape, v in ((image.shape[-2:], -2.0), (image.shape, 0.0))
    )
    optimizer = torch.optim.Adam([mask, pattern], lr=0.1, betas=(0.5, 0.9))

    def apply(x: Tensor) -> Tensor:
        return torch.lerp(x, pattern.sigmoid().expand_as(x), mask.sigmoid().expand_as(x))

    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(apply(image[None])), torch.tensor([0])) + weight * mask.sigmoid().sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((labels_of(net, apply(others)) == 0).double().mean())


def anomaly_index(sizes: np.ndarray) -> float:
    """How far the smallest median size of a target's triggers lies below the others', in deviations of a normal law."""
    finite = np.where(np.isinf(sizes), np.nanmax(np.where(np.isinf(sizes), np.nan, sizes), initial=1.0), sizes)
    medians = np.nanmedian(finite, axis=0)
    centre = float(np.median(medians))
    spread = 1.4826 * float(np.median(np.abs(medians - centre)))
    return (centre - float(medians.min())) / spread if spread > 0 else 0.0
