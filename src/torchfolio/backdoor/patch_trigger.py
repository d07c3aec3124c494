"""Patches (Gu et al., "BadNets", 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchfolio.backdoor.keyed_random import keyed_uniform
from torchfolio.backdoor.trigger_base import Trigger, check_unit

__all__ = ["PatchTrigger"]

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]


class PatchTrigger(Trigger):
    """A patch in place of pixels, $x' = x + \\alpha\\, m \\odot (p - x)$.

    Args:
        pattern: $p$, `[C, H, W]` or `[1, H, W]` for all channels.
        mask: $m$ in [0, 1], `[H, W]` or `[1, H, W]`.
        alpha: $\\alpha$ in [0, 1].
        random_location: whether to put the box that holds the patch at a place drawn for each image.
        seed: seed of those places.

    Raises:
        ValueError: on shapes that do not fit, values outside [0, 1], or an empty mask where its place is random.
    """

    pattern: Tensor
    mask: Tensor

    def __init__(
        self, pattern: Tensor, mask: Tensor, alpha: float = 1.0, *, random_location: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        mask = mask if mask.dim() == 3 else mask[None]
        if pattern.dim() != 3 or mask.shape[-2:] != pattern.shape[-2:] or len(mask) != 1:
            raise ValueError(
                f"expected a pattern [C, H, W] and a mask [H, W], got {tuple(pattern.shape)} and {tuple(mask.shape)}"
            )
        for name, value in {"pattern": pattern, "mask": mask, "alpha": torch.tensor(alpha)}.items():
            check_unit(name, value)
        if random_location and not bool((mask > 0).any()):
            raise ValueError("a patch at a random place needs a mask that is not empty")
        self.register_buffer("pattern", pattern.float())
        self.register_buffer("mask", mask.float())
        self.alpha, self.random_location, self.seed = alpha, random_location, seed

    @classmethod
    def checkerboard(
        cls, shape: Sequence[int], size: int = 3, corner: Corner = "bottom-right", margin: int = 1, **settings: Any
    ) -> PatchTrigger:
        """The patch of BadNets: a checkerboard of `size` pixels, `margin` pixels from a corner.

        Args:
            shape: `[C, H, W]` of the images.
            size: side of the patch.
            corner: corner of the image.
            margin: pixels between the patch and the border.
            **settings: settings of `PatchTrigger`.
        """
        rows, columns = _box(shape, size, corner, margin)
        pattern, mask = torch.zeros(1, *shape[-2:]), torch.zeros(*shape[-2:])
        pattern[0, rows, columns] = ((torch.arange(size)[:, None] + torch.arange(size)) % 2 == 0).float()
        mask[rows, columns] = 1
        return cls(pattern, mask, **settings)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        pattern, mask = self.pattern.to(x), self.mask.to(x)
        if self.random_location:
            pattern, mask = self._moved(pattern, mask, index)
        return torch.lerp(x, pattern.expand_as(x) if pattern.dim() == 4 else pattern, self.alpha * mask)

    def _moved(self, pattern: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        height, width = mask.shape[-2:]
        rows, columns = (mask[0] > 0).any(1).nonzero()[:, 0], (mask[0] > 0).any(0).nonzero()[:, 0]
        extent = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        u = keyed_uniform(self.seed, index, (2,))
        top, left = ((u[:, k] * (side - extent[k] + 1)).long() for k, side in enumerate((height, width)))
        # Roll every image's pattern so that its box begins at (top, left).
        i = (torch.arange(height, device=mask.device) - (top - rows[0])[:, None]) % height
        j = (torch.arange(width, device=mask.device) - (left - columns[0])[:, None]) % width
        place = i[:, :, None], j[:, None, :]
        return pattern[:, place[0], place[1]].transpose(0, 1), mask[:, place[0], place[1]].transpose(0, 1)

    def image_shape(self) -> Sequence[int]:
        return self.pattern.shape

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "random_location": self.random_location, "seed": self.seed}


def _box(shape: Sequence[int], size: int, corner: Corner, margin: int) -> tuple[slice, slice]:
    """Rows and columns of a square near a corner."""
    vertical, _, horizontal = corner.partition("-")
    if vertical not in ("top", "bottom") or horizontal not in ("left", "right"):
        raise ValueError(f"expected corner to be top-left, top-right, bottom-left or bottom-right, got {corner!r}")
    height, width = shape[-2:]
    if size < 1 or margin < 0 or size + margin > min(height, width):
        raise ValueError(f"a patch of {size} pixels, {margin} from the border, does not fit images of {height}x{width}")
    top = margin if vertical == "top" else height - margin - size
    left = margin if horizontal == "left" else width - margin - size
    return slice(top, top + size), slice(left, left + size)
