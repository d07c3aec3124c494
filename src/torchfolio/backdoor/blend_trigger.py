"""Patterns blended over the whole image (Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data
Poisoning", 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.backdoor.trigger_base import Trigger, check_unit

__all__ = ["BlendTrigger"]


class BlendTrigger(Trigger):
    """A pattern over the whole image, $x' = (1 - \\alpha) x + \\alpha p$.

    Args:
        pattern: $p$, `[C, H, W]` or `[1, H, W]`.
        alpha: $\\alpha$ in [0, 1].
    """

    pattern: Tensor

    def __init__(self, pattern: Tensor, alpha: float = 0.2) -> None:
        super().__init__()
        if pattern.dim() != 3:
            raise ValueError(f"expected a pattern [C, H, W], got shape {tuple(pattern.shape)}")
        check_unit("pattern", pattern)
        check_unit("alpha", torch.tensor(alpha))
        self.register_buffer("pattern", pattern.float())
        self.alpha = alpha

    @classmethod
    def noise(cls, shape: Sequence[int], alpha: float = 0.2, seed: int = 0, cells: int = 4) -> BlendTrigger:
        """A smooth random pattern: uniform noise on `cells` x `cells` points, enlarged to `shape` `[C, H, W]`."""
        coarse = torch.rand(1, shape[0], cells, cells, generator=torch.Generator().manual_seed(seed))
        return cls(F.interpolate(coarse, tuple(shape[-2:]), mode="bilinear", align_corners=True)[0].clamp(0, 1), alpha)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.lerp(x, self.pattern.to(x).expand_as(x), torch.as_tensor(self.alpha).to(x))

    def image_shape(self) -> Sequence[int]:
        return self.pattern.shape

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha}
