"""Masks of images from a few cells: nearest neighbours, then a Gaussian blur."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import positive, whole

__all__ = ["render_mask"]


def render_mask(
    cells: Tensor, size: tuple[int, int], *, kernel: int | None = None, sigma: float | None = None
) -> Tensor:
    """Masks of images from their cells: nearest neighbours to the images' size, then a Gaussian blur.

    Both are linear and separable, so that a mask is $R_H\\, C\\, R_W^\\top$ with two small matrices that are made once.
    The blur reflects at the border.

    Args:
        cells: values of a grid, `[B, rows, columns]`.
        size: height and width of the images.
        kernel: odd width of the blur in pixels, 1 for none; by default 0.06 of each side, at least 3.
        sigma: standard deviation of the blur in pixels; by default 0.027 of each side.

    Returns:
        Masks `[B, 1, H, W]`, which stay within the range of the cells.

    Raises:
        ValueError: on other shapes, a grid larger than the image, an even kernel or one that does not fit, or a
            sigma that is not positive.
    """
    if cells.dim() != 3 or len(size) != 2:
        raise ValueError(f"expected cells [B, rows, columns] and a size (H, W), got {tuple(cells.shape)} and {size!r}")
    matrices = []
    for count, side in zip(cells.shape[1:], size, strict=True):
        matrices.append(_axis(count, whole("a side of the image", side, 1), *_blur(side, kernel, sigma)).to(cells))
    return (matrices[0] @ cells @ matrices[1].mT)[:, None]


def _blur(side: int, kernel: int | None, sigma: float | None) -> tuple[int, float]:
    """Width and deviation, scaled with the image as 13 and 6 are to 224 pixels."""
    width = max(3, 2 * round(0.03 * side) + 1) if kernel is None else whole("kernel", kernel, 1)
    deviation = max(0.027 * side, 0.3) if sigma is None else float(positive("sigma", sigma))
    return width, deviation


@lru_cache(maxsize=64)
def _axis(count: int, side: int, kernel: int, sigma: float) -> Tensor:
    """The matrix `[side, count]` that spreads cells over one axis and blurs them."""
    if count > side:
        raise ValueError(f"expected a grid no larger than the image, got {count} cells on {side} pixels")
    if kernel % 2 == 0 or kernel // 2 >= side:
        raise ValueError(f"expected an odd kernel whose half is smaller than the image's {side} pixels, got {kernel}")
    spread = F.interpolate(torch.eye(count, dtype=torch.float64)[None], size=side, mode="nearest")[0]
    places = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    weights = torch.softmax(-0.5 * (places / sigma) ** 2, 0)
    if kernel > 1:
        padded = F.pad(spread[:, None], (kernel // 2,) * 2, mode="reflect")
        spread = F.conv1d(padded, weights[None, None])[:, 0]
    return spread.T.contiguous()
