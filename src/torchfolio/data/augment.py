"""Augmentation of whole batches, on their device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class CropFlip:
    """Pad, take a random crop of the original size, and flip half of the images, each for itself.

    Args:
        padding: pixels on every side; 0 does not crop.
        flip: whether to flip left and right.
        mode: `"reflect"`, or `"constant"` for zeros.

    Shapes:
        `[B, C, H, W]` to the same.

    Raises:
        ValueError: if the padding is negative or, reflecting, not smaller than the image.
    """

    def __init__(self, padding: int = 4, flip: bool = True, mode: Literal["reflect", "constant"] = "reflect") -> None:
        if padding < 0:
            raise ValueError(f"expected padding of at least 0, got {padding}")
        if mode not in ("reflect", "constant"):
            raise ValueError(f"expected mode to be 'reflect' or 'constant', got {mode!r}")
        self.padding, self.flip, self.mode = padding, flip, mode

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected a batch of images [B, C, H, W], got shape {tuple(x.shape)}")
        batch, channels, height, width = x.shape
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise ValueError(f"expected padding below the image's side {min(height, width)}, got {self.padding}")
        columns = torch.arange(width, device=x.device).expand(batch, width)
        if self.flip:
            flipped = self._random(2, batch, x.device, generator).bool()
            columns = torch.where(flipped[:, None], width - 1 - columns, columns)
        if not self.padding:
            return x.gather(3, columns[:, None, None, :].expand(batch, channels, height, width)) if self.flip else x
        rows = torch.arange(height, device=x.device).expand(batch, height)
        rows = rows + self._random(2 * self.padding + 1, batch, x.device, generator)[:, None]
        columns = columns + self._random(2 * self.padding + 1, batch, x.device, generator)[:, None]
        padded = F.pad(x, (self.padding,) * 4, mode=self.mode)
        # One gather of whole pixels: rows and columns of every image by its own offsets.
        index = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        cropped = padded.flatten(2).gather(2, index.flatten(1)[:, None].expand(batch, channels, height * width))
        return cropped.view_as(x)

    def __repr__(self) -> str:
        return f"CropFlip(padding={self.padding}, flip={self.flip}, mode={self.mode!r})"

    @staticmethod
    def _random(high: int, n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        source = generator.device if generator is not None else device
        return torch.randint(high, (n,), generator=generator, device=source).to(device)
