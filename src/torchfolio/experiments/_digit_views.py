"""Augmentations of small grey images, one kind after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Views"]


class Views:
    """The first so many of: shift and scale, rotation, contrast, noise, cutout; all drawn for each image."""

    def __init__(self, kinds: int) -> None:
        self.kinds = kinds

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        n, side = len(x), x.shape[-1]
        draw = lambda low, high: low + (high - low) * torch.rand(n, generator=generator, device=x.device)  # noqa: E731
        angle = draw(-0.35, 0.35) if self.kinds > 1 else torch.zeros(n, device=x.device)
        scale, across, down = draw(0.8, 1.2), draw(-0.25, 0.25), draw(-0.25, 0.25)
        c, s = scale * angle.cos(), scale * angle.sin()
        theta = torch.stack([torch.stack([c, -s, across], 1), torch.stack([s, c, down], 1)], 1)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        if self.kinds > 2:
            x = x * draw(0.5, 1.5).view(-1, 1, 1, 1)
        if self.kinds > 3:
            x = x + 0.15 * torch.randn(x.shape, generator=generator, device=x.device)
        if self.kinds > 4:
            rows, columns = (draw(0, side - 2).long().view(-1, 1) for _ in range(2))
            place = torch.arange(side, device=x.device)
            inside = [((place >= start) & (place < start + 3)) for start in (rows, columns)]
            x = x.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0)
        return x
