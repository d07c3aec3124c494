"""Patches of images as filters are learned from them: drawn at random, normalised, whitened."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchfolio.checks import at_least, images, whole
from torchfolio.shown import Shown

__all__ = ["Whitening", "draw_patches", "normalize_patches"]

BLANK = 0.01  # share of the median variance below which a patch is taken as constant


@dataclass(frozen=True, repr=False)
class Whitening(Shown):
    """What patches go through: contrast normalisation, then $Z(x - \\mu)$.

    Attributes:
        matrix: Z, `[d, d]`.
        mean: $\\mu$, `[d]`.
        contrast: constant of the contrast normalisation, or `None` for none.
    """

    matrix: Tensor
    mean: Tensor
    contrast: float | None = 0.01

    @staticmethod
    def fit(patches: Tensor, epsilon: float = 0.1, contrast: float | None = 0.01) -> Whitening:
        """ZCA of (normalised) patches `[n, d]`: $Z = U(\\Lambda + \\epsilon)^{-1/2} U^\\top$."""
        at_least("epsilon", epsilon, 0)
        x = patches.double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((x - mean).mT, correction=0).reshape(x.shape[1], x.shape[1]))
        scale = (values.clamp(min=0) + epsilon).rsqrt()
        if not scale.isfinite().all():
            raise ValueError("expected patches that vary in all directions, or epsilon above 0, got epsilon=0")
        return Whitening(((vectors * scale) @ vectors.mT).float(), mean.float(), contrast)

    def __call__(self, patches: Tensor) -> Tensor:
        """Whitened patches of raw ones `[..., d]`."""
        x = patches if self.contrast is None else normalize_patches(patches, self.contrast)
        return (x - self.mean) @ self.matrix.mT


def normalize_patches(patches: Tensor, contrast: float = 0.01) -> Tensor:
    """$(x - \\bar x) / \\sqrt{\\mathrm{var}(x) + c}$ for every patch `[..., d]`; c = 0.01 suits images in [0, 1]."""
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + contrast).sqrt()


def draw_patches(
    X: Tensor, size: int, n: int, *, drop_blank: bool = True, seed: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Patches at random positions, `[n or fewer, C size size]`.

    Args:
        X: images `[N, C, H, W]`.
        size: side of the patches.
        n: number of patches drawn, before blank ones are dropped.
        drop_blank: whether nearly constant patches are left out: those whose variance is below 1 % of the median of all
            variances above 0. On digits most patches are blank and ruin clustering.
        seed: seed of the positions.
        generator: generator in place of the seed.

    Raises:
        ValueError: if the images are smaller than the patches, or all patches are constant.
    """
    images(X, name="X")
    N, _, H, W = X.shape
    whole("size", size, 1)
    if min(H, W) < size:
        raise ValueError(f"expected images of at least {size}x{size}, got {H}x{W}")
    generator = torch.Generator().manual_seed(seed) if generator is None else generator
    which, top, left = (
        torch.randint(high, (whole("n", n, 1),), generator=generator) for high in (N, H - size + 1, W - size + 1)
    )
    offsets = torch.arange(size)
    rows, columns = top[:, None, None] + offsets[:, None], left[:, None, None] + offsets
    patches = X.detach().cpu().float()[which[:, None, None], :, rows, columns].permute(0, 3, 1, 2).flatten(1)
    if not drop_blank:
        return patches
    variances = patches.var(1, correction=0)
    varied = variances[variances > 1e-12]
    if not len(varied):
        raise ValueError("expected images that vary, got constant patches only")
    return patches[variances >= BLANK * varied.median()]
