"""Smooth warps of an image (Nguyen and Tran, "WaNet", ICLR 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.backdoor.keyed_random import keyed_uniform
from torchfolio.backdoor.trigger_base import Trigger

__all__ = ["WarpTrigger"]


class WarpTrigger(Trigger):
    """A smooth warp of the image. A field $n \\sim U(-1, 1)$ on `k` x `k` points is divided by its mean magnitude and
    enlarged (bicubic) to the image; pixels are read at

    $$g = \\operatorname{clamp}\\bigl((\\text{identity} + s\\, n / H) \\cdot \\text{rescale}, -1, 1\\bigr).$$

    Args:
        k: points of the field on a side.
        s: strength $s$; 0 leaves the image as it is.
        grid_rescale: factor on the grid.
        noise: whether to add $U(-1, 1) / H$ to the grid for every pixel and image: the "cover" version whose label is
            kept.
        seed: seed of the field and the noise.
        field: `[2, k, k]`; drawn by default.
    """

    field: Tensor

    def __init__(
        self,
        k: int = 4,
        s: float = 0.5,
        grid_rescale: float = 1.0,
        noise: bool = False,
        seed: int = 0,
        field: Tensor | None = None,
    ) -> None:
        super().__init__()
        checks.whole("k", k, 2)
        checks.whole("seed", seed)
        for name, value in (("s", s), ("grid_rescale", grid_rescale)):
            checks.finite(name, checks.number(name, value))
        if field is None:
            drawn = 2 * torch.rand(2, k, k, generator=torch.Generator().manual_seed(seed)) - 1
            field = drawn / drawn.abs().mean()
        if field.shape != (2, k, k):
            raise ValueError(f"expected a field of shape (2, {k}, {k}), got {tuple(field.shape)}")
        self.register_buffer("field", field.float())
        self.k, self.s, self.grid_rescale, self.noise, self.seed = k, s, grid_rescale, noise, seed

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        height, width = x.shape[2:]
        flow = F.interpolate(self.field.to(x)[None], (height, width), mode="bicubic", align_corners=True)
        theta = torch.eye(2, 3, dtype=x.dtype, device=x.device)[None]
        identity = F.affine_grid(theta, [1, 1, height, width], align_corners=True)
        grid = (identity + self.s * flow.permute(0, 2, 3, 1) / height) * self.grid_rescale
        if self.noise:
            u = keyed_uniform(self.seed + 1, index, (height, width, 2)).to(x)
            grid = grid + (2 * u - 1) / height
        grid = grid.clamp(-1, 1).expand(len(x), height, width, 2)
        return F.grid_sample(x, grid, align_corners=True)

    def settings(self) -> dict[str, Any]:
        names = ("k", "s", "grid_rescale", "noise", "seed")
        return {name: getattr(self, name) for name in names}
