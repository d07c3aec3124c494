"""Networks that make triggered images, for `GeneratorTrigger`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, whole

__all__ = ["TriggerNet", "UniversalPattern"]


class TriggerNet(nn.Module):
    """A residual network from images to triggered images, $g(x) = x + \\varepsilon \\tanh h(x)$.

    It starts near $x$: the form $(\\tanh h + 1)/2$ of the published generator starts near grey, where the clip to the ball
    around $x$ leaves hardly a gradient.

    Args:
        channels: channels of the images.
        eps: $\\varepsilon$, largest change of a pixel.
        width: channels of the first layer.
        blocks: residual blocks; 2 for small images, 6 for photographs.

    Shapes:
        `[N, C, H, W]` to the same; H and W multiples of 4, at least 4.

    Reference:
        Naseer et al., "Cross-Domain Transferability of Adversarial Perturbations", NeurIPS 2019 (its generator).
    """

    def __init__(self, channels: int = 3, eps: float = 8 / 255, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.eps = at_least("eps", eps, 0)
        inner = 4 * whole("width", width, 1)
        self.body = nn.Sequential(
            nn.ReflectionPad2d(3), *_conv(channels, width, 7, padding=0),
            *_conv(width, 2 * width, 3, stride=2, padding=1), *_conv(2 * width, inner, 3, stride=2, padding=1),
            *(_Residual(inner) for _ in range(whole("blocks", blocks, 0))),
            *_conv(inner, 2 * width, 4, stride=2, padding=1, kind=nn.ConvTranspose2d),
            *_conv(2 * width, width, 4, stride=2, padding=1, kind=nn.ConvTranspose2d),
            nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(f"expected images with sides that are multiples of 4, got {tuple(x.shape[-2:])}")
        return x + self.eps * self.body(x).tanh()


def _conv(fan_in: int, fan_out: int, size: int, kind: Any = nn.Conv2d, **settings: int) -> list[nn.Module]:
    return [kind(fan_in, fan_out, size, bias=False, **settings), nn.BatchNorm2d(fan_out), nn.ReLU()]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        second = _conv(width, width, 3, padding=1)[:-1]
        self.body = nn.Sequential(*_conv(width, width, 3, padding=1), nn.Dropout(0.5), *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class UniversalPattern(nn.Module):
    """One pattern for all images in place of a network, $g(x) = x + \\varepsilon \\tanh \\delta$.

    Args:
        shape: `[C, H, W]` of the images.
        eps: $\\varepsilon$, largest change of a pixel.
    """

    def __init__(self, shape: tuple[int, ...], eps: float = 8 / 255) -> None:
        super().__init__()
        self.eps = at_least("eps", eps, 0)
        self.delta = nn.Parameter(0.01 * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.eps * self.delta.tanh()
