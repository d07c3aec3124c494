"""Pools for networks whose feature maps differ in size or shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class MeanPool2d(nn.Module):
    """Adaptive average pooling that holds nothing for the backward pass where the output divides the input.

    PyTorch's own keeps its whole input, of which the backward pass reads the shape alone.

    Args:
        output_size: height and width of the output.

    Shapes:
        `[B, C, H, W]` to `[B, C, *output_size]`.
    """

    def __init__(self, output_size: Sequence[int]) -> None:
        super().__init__()
        self.height, self.width = output_size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.height or x.shape[-1] % self.width:
            return F.adaptive_avg_pool2d(x, (self.height, self.width))
        return x.unflatten(-1, (self.width, -1)).unflatten(-3, (self.height, -1)).mean((-3, -1))


class GlobalPool(nn.Module):
    """Average over all positions: `[B, C, ...] -> [B, C]`, tokens `[B, T, D] -> [B, D]`, `[B, D]` unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x
        return x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2)
