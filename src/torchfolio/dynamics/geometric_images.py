r"""Random images whose best denoising error is known: regions with smooth contours, and discs.

Reference:
    Kadkhodaie, Guth, Simoncelli, Mallat, ICLR 2024, arXiv 2310.02557, sections 3.2 and 3.3. Optimal rates of
    $C^\alpha$ images: Korostelev, Tsybakov, "Minimax Theory of Image Reconstruction", 1993.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import at_least, whole

__all__ = ["c_alpha_images", "disc_images", "shuffle_pixels"]


def c_alpha_images(n: int, size: int = 80, alpha: float = 2.0, *, seed: int = 0) -> Tensor:
    r"""Two regions with $C^\alpha$ backgrounds, divided by a $C^\alpha$ contour.

    The least mean squared error goes with $\sigma^{2\alpha/(\alpha + 1)}$, so that the best PSNR rises with slope
    $\alpha/(\alpha + 1)$ against that of the noisy image.

    Args:
        n: number of images.
        size: side N, 4 or more.
        alpha: smoothness of contour and backgrounds, 0 or more; white noise, of which both are made, is damped by
            $|k|^{-\alpha}$ at frequency k.
        seed: seed of the draws.

    Returns:
        Images in [0, 1], `[n, 1, size, size]`.
    """
    whole("n", n, 1)
    whole("size", size, 4)
    at_least("alpha", alpha, 0)
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: 2 * torch.rand(*shape, generator=generator) - 1  # noqa: E731
    k = torch.arange(size // 2 + 1.0)
    k[0] = 1  # the constant is damped like its neighbour
    contour = torch.fft.irfft(torch.fft.rfft(uniform(n, size)) * k**-alpha, size)
    threshold = torch.round(contour * size) + size / 2
    above = (torch.arange(size)[:, None] < threshold[:, None, :]).float()
    rows, columns = torch.fft.fftfreq(size) * size, torch.fft.rfftfreq(size) * size
    radius = (rows[:, None].square() + columns.square()).sqrt()
    radius[0, 0] = 1
    fields = torch.fft.irfft2(torch.fft.rfft2(uniform(n, 2, size, size)) * radius**-alpha, s=(size, size))
    low, high = fields.amin((2, 3), keepdim=True), fields.amax((2, 3), keepdim=True)
    fields = (fields - low) / (high - low)
    u = torch.rand(n, 2, 1, 1, generator=generator)
    bright, dark = u[:, :1] + (1 - u[:, :1]) * fields[:, :1], u[:, 1:] * fields[:, 1:]
    mask = F.avg_pool2d(F.pad(above[:, None], (0, 1, 0, 1), mode="reflect"), 2, 1)
    # Which of the two is above is drawn too.
    mask = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, mask, 1 - mask)
    return mask * bright + (1 - mask) * dark


def disc_images(n: int, size: int = 40, *, seed: int = 0) -> Tensor:
    r"""Discs: place, radius, and brightness within and without make five dimensions.

    On a smooth manifold of five dimensions the least mean squared error, summed over pixels, is about $5\sigma^2$ for
    small noise, whatever the size.

    Args:
        n: number of images.
        size: side, 8 or more.
        seed: seed of the draws.

    Returns:
        Images in [0, 1], `[n, 1, size, size]`, with edges that are two pixels soft, so that they move smoothly.
    """
    whole("n", n, 1)
    whole("size", size, 8)
    u = torch.rand(n, 5, 1, 1, generator=torch.Generator().manual_seed(seed))
    centre, radius = (0.3 + 0.4 * u[:, :2]) * size, (0.1 + 0.2 * u[:, 2]) * size
    place = torch.arange(size) + 0.5
    distance = ((place[:, None] - centre[:, 0]).square() + (place - centre[:, 1]).square()).sqrt()
    inside = torch.sigmoid(2 * (radius - distance))[:, None]
    return inside * u[:, 3:4] + (1 - inside) * u[:, 4:5]


def shuffle_pixels(images: Tensor, *, seed: int = 0) -> Tensor:
    """The same permutation of pixels in all images, which leaves the best denoising error as it is.

    Args:
        images: `[n, C, H, W]`.
        seed: seed of the permutation.
    """
    order = torch.randperm(images.shape[-2] * images.shape[-1], generator=torch.Generator().manual_seed(seed))
    return images.flatten(2)[..., order.to(images.device)].reshape(images.shape)
