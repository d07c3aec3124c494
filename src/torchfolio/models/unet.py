"""A small U-Net with an optional time input (Ronneberger et al., MICCAI 2015; Ho et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.models.chain import remembered


class UNetBlock(nn.Module):
    """Two convolutions with group norm on a residual path, shifted by a time embedding if there is one."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.GroupNorm(_groups(in_channels), in_channels),
            nn.GroupNorm(_groups(out_channels), out_channels),
        )
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, out_channels) if time_dim else None
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None and time is not None:
            h = h + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


@remembered
class UNet(nn.Module):
    """A small U-Net, from image to image, with an optional time input for diffusion.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; those of the input by default.
        widths: channels at each resolution, finest first.
        timed: whether `forward` takes a time for each example.

    Shapes:
        `x` `[B, in_channels, H, W]` with H, W multiples of `2 ** (len(widths) - 1)`, `t` `[B]`, to
        `[B, out_channels, H, W]`.

    Reference:
        Ronneberger et al., "U-Net", MICCAI 2015; time embedding as in Ho et al., "Denoising Diffusion
        Probabilistic Models", NeurIPS 2020.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        widths: Sequence[int] = (32, 64, 128),
        timed: bool = False,
    ) -> None:
        super().__init__()
        time_dim = 4 * widths[0] if timed else 0
        self.time_width = widths[0]
        self.time = (
            nn.Sequential(nn.Linear(widths[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)) if timed else None
        )
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        pairs = list(zip([widths[0], *widths], widths, strict=False))
        self.down = nn.ModuleList([UNetBlock(a, b, time_dim) for a, b in pairs])
        self.middle = UNetBlock(widths[-1], widths[-1], time_dim)
        self.up = nn.ModuleList([UNetBlock(b + b, a, time_dim) for a, b in reversed(pairs)])
        self.head = nn.Sequential(
            nn.GroupNorm(_groups(widths[0]), widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], out_channels or in_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        factor = 2 ** (len(self.down) - 1)
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(f"expected height and width to be multiples of {factor}, got {tuple(x.shape[-2:])}")
        if (t is None) != (self.time is None):
            raise ValueError(
                "this network takes a time for each example" if t is None else "this network takes no time"
            )
        time = None if t is None or self.time is None else self.time(_time_features(t, self.time_width))
        h, skips = self.stem(x), []
        for k, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if k else h, time)
            skips.append(h)
        h = self.middle(h, time)
        for k, block in enumerate(self.up):
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0) if k else h, skips.pop()], 1), time)
        return self.head(h)


def _time_features(t: Tensor, dim: int) -> Tensor:
    rate = torch.exp(torch.arange(dim // 2, device=t.device) * (-9.2103 / (dim // 2)))
    angle = t[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)
