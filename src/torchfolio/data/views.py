"""Random views of images: crop and resize, flip, colour, grey, blur, as operations on whole batches.

Every image draws for itself, everything stays on the device of the batch, and all of it is differentiable in the image.
A pipeline is a list of operations; `TwoViews` gives two independent draws, as self-supervised learning wants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import between

__all__ = ["Blur", "ColorJitter", "Compose", "Flip", "Grey", "ResizedCrop", "TwoViews", "simclr_views"]

View = Callable[..., Tensor]


def _uniform(count: int, low: float, high: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw for each image, on the device of the batch."""
    place = generator.device if generator is not None else like.device
    draws = torch.rand(count, generator=generator, device=place).to(like.device, torch.float32)
    return (low + (high - low) * draws).to(like.dtype)


def _images(x: Tensor) -> Tensor:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"expected a batch of floating-point images [B, C, H, W], got {x.dtype} of shape {tuple(x.shape)}"
        )
    return x


def _chosen(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    return (_uniform(len(x), 0, 1, x.float(), generator) < p).view(-1, 1, 1, 1)


class _Operation:
    """An operation on a batch, with a `repr` from its settings."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in vars(self).items())
        return f"{type(self).__name__}({settings})"


class ResizedCrop(_Operation):
    """Crops of random area and aspect ratio, resized to the side of the image, bilinearly (`grid_sample`).

    Args:
        scale: range of the crop's share of the area.
        ratio: range of width over height, drawn evenly in the logarithm.

    Shapes:
        `[B, C, H, W]` to the same.
    """

    def __init__(self, scale: tuple[float, float] = (0.2, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> None:
        between("scale[0]", scale[0], 0, scale[1])
        between("scale[1]", scale[1], scale[0], 1)
        between("ratio[0]", ratio[0], 1e-3, ratio[1])
        self.scale, self.ratio = scale, ratio

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _images(x)
        area = _uniform(len(x), *self.scale, x, generator)
        shape = _uniform(len(x), math.log(self.ratio[0]), math.log(self.ratio[1]), x, generator).exp()
        width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
        # In the grid's coordinates the image is [-1, 1]: a crop of half side w is centred in [w - 1, 1 - w].
        across = (1 - width) * _uniform(len(x), -1, 1, x, generator)
        down = (1 - height) * _uniform(len(x), -1, 1, x, generator)
        zero = torch.zeros_like(width)
        theta = torch.stack([torch.stack([width, zero, across], 1), torch.stack([zero, height, down], 1)], 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


class Flip(_Operation):
    """Left and right exchanged, with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = between("p", p, 0, 1)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.where(_chosen(_images(x), self.p, generator), x.flip(-1), x)


class ColorJitter(_Operation):
    """Brightness, contrast, saturation and hue changed at random, of colour images; of others the first two.

    Args:
        brightness: factors are drawn from $1 \\pm$ it.
        contrast: strength, likewise, about the mean grey of the image.
        saturation: strength, likewise, about the grey image.
        hue: rotation of the chroma plane, at most this share of a turn, either way.
        p: probability that an image is changed at all.
        bounds: range that values are clamped to; `None` leaves them (for normalised images).
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        p: float = 0.8,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            between(name, value, 0, 1)
        between("hue", hue, 0, 0.5)
        between("p", p, 0, 1)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.p, self.bounds = p, bounds

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _images(x)
        chosen = _chosen(x, self.p, generator)

        def factor(spread: float) -> Tensor:
            return _uniform(len(x), 1 - spread, 1 + spread, x, generator).view(-1, 1, 1, 1)

        changed = x * factor(self.brightness)
        mean = grey(changed).mean((-2, -1), keepdim=True)
        changed = mean + (changed - mean) * factor(self.contrast)
        if x.shape[1] == 3:
            tone = grey(changed)
            changed = tone + (changed - tone) * factor(self.saturation)
            angle = 2 * math.pi * _uniform(len(x), -self.hue, self.hue, x, generator)
            changed = _rotate_hue(changed, angle)
        if self.bounds is not None:
            changed = changed.clamp(*self.bounds)
        return torch.where(chosen, changed, x)


def grey(x: Tensor) -> Tensor:
    """Luma `[B, 1, H, W]` of colour images (ITU-R 601); the mean over channels of others."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return (x * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def _rotate_hue(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the chroma plane of YIQ, image by image, which leaves the luma."""
    to = _TO_YIQ.to(x.device, torch.float64)
    c, s = angle.double().cos(), angle.double().sin()
    turn = torch.zeros(len(x), 3, 3, dtype=torch.float64, device=x.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = c, -s, s, c
    matrix = (torch.linalg.inv(to) @ turn @ to).to(x.dtype)
    return torch.einsum("bij,bjhw->bihw", matrix, x)


class Grey(_Operation):
    """Colour taken away, with probability `p`; the number of channels stays."""

    def __init__(self, p: float = 0.2) -> None:
        self.p = between("p", p, 0, 1)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.where(_chosen(_images(x), self.p, generator), grey(x).expand_as(x), x)


class Blur(_Operation):
    """Gaussian blur of random width, with probability `p`.

    Args:
        sigma: range of the standard deviation in pixels.
        p: probability.
    """

    def __init__(self, sigma: tuple[float, float] = (0.1, 1.0), p: float = 0.5) -> None:
        between("sigma[0]", sigma[0], 1e-3, sigma[1])
        self.sigma, self.p = sigma, between("p", p, 0, 1)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _images(x)
        chosen = _chosen(x, self.p, generator)
        reach = min(math.ceil(3 * self.sigma[1]), min(x.shape[-2:]) - 1)
        if reach < 1:
            return x
        sigma = _uniform(len(x), *self.sigma, x, generator).view(-1, 1)
        places = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
        weights = (-0.5 * (places / sigma).square()).softmax(1)
        batch, channels, height, width = x.shape
        kernel = weights.repeat_interleave(channels, 0)
        flat = x.reshape(1, batch * channels, height, width)
        padded = F.pad(flat, (reach, reach, reach, reach), mode="reflect")
        rows = F.conv2d(padded, kernel[:, None, :, None], groups=batch * channels)
        blurred = F.conv2d(rows, kernel[:, None, None, :], groups=batch * channels)
        return torch.where(chosen, blurred.view_as(x), x)


class Compose(_Operation):
    """Operations one after the other."""

    def __init__(self, operations: Sequence[View]) -> None:
        self.operations = list(operations)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for operation in self.operations:
            x = operation(x, generator)
        return x


class TwoViews(_Operation):
    """Two independent views of every image, computed as one batch.

    Args:
        view: an operation or a pipeline.

    Shapes:
        `[B, C, H, W]` to two of the same.
    """

    def __init__(self, view: View) -> None:
        self.view = view

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        first, second = self.view(torch.cat([x, x]), generator).chunk(2)
        return first, second


def simclr_views(strength: float = 0.5, *, blur: bool = False, **crop: Any) -> Compose:
    """The augmentations of SimCLR: crop, flip, colour, grey, and blur where images are large.

    Args:
        strength: strength of the colour changes; 0.5 for 32-pixel images, 1 for photographs.
        blur: whether to blur.
        **crop: arguments of `ResizedCrop`.
    """
    color = ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    operations: list[View] = [ResizedCrop(**crop), Flip(), color, Grey()]
    return Compose([*operations, Blur()] if blur else operations)
