"""The defender's own trigger: a small square of one value in a corner of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio import checks

__all__ = ["Stamp"]

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]


class Stamp(nn.Module):
    """Sets a small square in a corner of every image to a fixed value, $s(x)$; $s \\circ s = s$.

    Args:
        size: side of the square; 2.
        corner: corner of the image.
        value: value of its pixels: a number, one per channel `[C]`, or `"mean"`, the mean of the training images, which
            `NAB.prepare` fills in. It must be visible: on images with black borders the mean is not.

    Shapes:
        `[N, C, H, W]` or `[C, H, W]` to the same.

    Raises:
        ValueError: if the stamp is larger than the image, or `"mean"` was not filled in.
    """

    value: Tensor

    def __init__(
        self,
        size: int = 2,
        corner: Corner = "top-left",
        value: float | Sequence[float] | Tensor | Literal["mean"] = "mean",
    ) -> None:
        super().__init__()
        checks.whole("size", size, 1)
        if corner not in ("top-left", "top-right", "bottom-left", "bottom-right"):
            raise ValueError(f"expected corner to be top-left, top-right, bottom-left or bottom-right, got {corner!r}")
        if isinstance(value, str) and value != "mean":
            raise ValueError(f"expected value to be a number, one per channel, or 'mean', got {value!r}")
        self.size, self.corner = size, corner
        # NaN stands for a mean that is not known yet.
        filled = torch.nan if isinstance(value, str) else value
        self.register_buffer("value", torch.as_tensor(filled, dtype=torch.float32).reshape(-1))

    @property
    def known(self) -> bool:
        """Whether the value is filled in."""
        return not bool(self.value.isnan().any())

    @classmethod
    def random(cls, seed: int, sizes: Sequence[int] = (2, 3), value: float | Literal["mean"] = "mean") -> Stamp:
        """A stamp whose corner and size an attacker cannot guess; the deployed network remembers them."""
        generator = np.random.default_rng(seed)
        corners: tuple[Corner, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")
        return cls(int(generator.choice(sizes)), corners[int(generator.integers(4))], value)

    def forward(self, x: Tensor) -> Tensor:
        if not self.known:
            raise ValueError("the stamp's value 'mean' is not known yet: NAB.prepare fills it in")
        rows, columns = self._box(x.shape)
        x = x.clone()
        x[..., rows, columns] = self.value.to(x)[:, None, None]
        return x

    def _box(self, shape: Sequence[int]) -> tuple[slice, slice]:
        if len(shape) < 3 or self.size > min(shape[-2:]):
            raise ValueError(f"a stamp of {self.size} pixels does not fit images of shape {tuple(shape)}")
        if len(self.value) not in (1, shape[-3]):
            raise ValueError(f"expected a stamp of {shape[-3]} channels, got a value for {len(self.value)}")
        vertical, _, horizontal = self.corner.partition("-")
        rows = slice(0, self.size) if vertical == "top" else slice(shape[-2] - self.size, shape[-2])
        columns = slice(0, self.size) if horizontal == "left" else slice(shape[-1] - self.size, shape[-1])
        return rows, columns

    def extra_repr(self) -> str:
        shown = [round(v, 4) for v in self.value.tolist()] if self.known else "mean"
        return f"size={self.size}, corner={self.corner!r}, value={shown}"
