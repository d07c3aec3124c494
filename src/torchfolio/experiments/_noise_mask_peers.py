"""A step of masks from a policy as the authors compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.training.noise_mask import Reinforce

__all__ = ["official_step"]


def official_step(pair: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward and backward with features and heads twice, upsampling, and a blur in two dimensions.

    Args:
        pair: module with the `policy`, of 8 by 8 cells, and the `classifier`.
        x: images `[N, 1, 16, 16]`.
        y: labels `[N]`.
    """
    line = torch.softmax(-0.5 * torch.arange(-1.0, 2.0) ** 2, 0)
    kernel, parts = (line[:, None] * line)[None, None], dict[str, Any](pair.named_children())

    def step() -> None:
        pair.zero_grad()
        parts["policy"](x)  # the base
        beta = parts["policy"](x)
        cells = beta.sample().clamp(1e-6, 1 - 1e-6)
        mask = F.interpolate(cells.view(-1, 1, 8, 8), size=(16, 16))
        mask = F.conv2d(F.pad(mask, (1, 1, 1, 1), mode="reflect"), kernel)
        losses = F.cross_entropy(parts["classifier"](x * mask), y, reduction="none")
        Reinforce()(losses, beta.log_prob(cells), losses.mean()).backward()

    return step
