"""Banks of convolution filters: what holds them, layers made of them, and the analytic ones.

Reference:
    Hirani and Abdulla, On filter design in deep convolutional neural network, arXiv 2410.21644, collates them. Whitening
    folded into the convolution, Gabor, DCT and wavelet banks are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, finite, one_of, whole
from torchfolio.layers.patches import Whitening
from torchfolio.shown import Shown

__all__ = ["Bank", "PatchNormConv2d", "dct_bank", "gabor_bank", "random_bank", "wavelet_bank"]


class PatchNormConv2d(nn.Conv2d):
    """A convolution of patches whose mean is taken off and whose contrast is normalised, each on its own.

    With the mean m and variance v of the patch under the filter, over all channels,
    $(w * x - m \\sum w) / \\sqrt{v + c} + b$. m and v come from box filters, so that nothing is unfolded. Arguments are
    those of `nn.Conv2d` (one group, no dilation, zero padding, which counts as zeros), and:

    Args:
        contrast: constant c above 0; 0.01 suits images in [0, 1].
    """

    def __init__(self, *args: Any, contrast: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.groups != 1 or self.dilation != (1, 1) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError("expected one group, no dilation and zero padding by a number, got something else")
        self.contrast = float(at_least("contrast", contrast, 1e-12))

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input[None])[0]
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)  # takes m * sum(w) off
        response = F.conv2d(input, weight, None, self.stride, self.padding)  # pyright: ignore[reportArgumentType]
        box: Any = {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding}
        mean, square = input.mean(1, keepdim=True), input.square().mean(1, keepdim=True)
        moments = F.avg_pool2d(torch.cat([mean, square], 1), **box)
        variance = (moments[:, 1:] - moments[:, :1].square()).clamp(min=0)
        response = response / (variance + self.contrast).sqrt()
        return response if self.bias is None else response + self.bias[:, None, None]


@dataclass(frozen=True, repr=False)
class Bank(Shown):
    """Filters `[K, C, k, k]`, and the preprocessing of patches that they expect.

    Attributes:
        filters: D, float32; in whitened space where there is a whitening.
        name: method that made them.
        whitening: map that patches go through before, or `None`.
        meta: figures and settings of the method by name.
    """

    filters: Tensor
    name: str = "bank"
    whitening: Whitening | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.filters.dim() != 4 or self.filters.shape[2] != self.filters.shape[3] or not self.filters.numel():
            raise ValueError(f"expected filters [K, C, k, k], got {list(self.filters.shape)}")
        finite("filters", self.filters)
        object.__setattr__(self, "filters", self.filters.detach().float())

    def __len__(self) -> int:
        return len(self.filters)

    @property
    def size(self) -> int:
        """Side k of the filters."""
        return self.filters.shape[-1]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weights DZ `[K, C, k, k]` and biases $-DZ\\mu$, which apply whitening and filters in one."""
        if self.whitening is None:
            return self.filters, None
        weight = self.filters.flatten(1) @ self.whitening.matrix
        return weight.view_as(self.filters), -weight @ self.whitening.mean

    def as_conv(self, stride: int = 1, padding: int = 0, trainable: bool = True) -> nn.Conv2d:
        """An ordinary convolution: whitening and filters, without contrast normalisation."""
        return self._filled(nn.Conv2d(*self._sizes(), stride, padding, bias=self.whitening is not None), trainable)

    def as_patch_norm_conv(self, stride: int = 1, padding: int = 0, trainable: bool = True) -> nn.Conv2d:
        """A convolution that also normalises every patch, as in learning; `as_conv` where there is no whitening."""
        if self.whitening is None or self.whitening.contrast is None:
            return self.as_conv(stride, padding, trainable)
        layer = PatchNormConv2d(*self._sizes(), stride, padding, contrast=self.whitening.contrast)
        return self._filled(layer, trainable)

    def _sizes(self) -> tuple[int, int, int]:
        return self.filters.shape[1], len(self), self.size

    def _filled(self, layer: nn.Conv2d, trainable: bool) -> nn.Conv2d:
        weight, bias = self.folded()
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer.requires_grad_(trainable)

    def take(self, indices: Any) -> Bank:
        """The bank of some filters."""
        return replace(self, filters=self.filters[indices])

    def plot(self, columns: int = 8) -> Any:
        """A figure of the filters, each scaled by its largest entry; without whitening."""
        import matplotlib.pyplot as plt

        images = self.filters / self.filters.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / 2 + 0.5
        images = images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)
        rows, columns = -(-len(self) // columns), min(columns, len(self))
        fig, axes = plt.subplots(rows, columns, figsize=(columns, rows), squeeze=False, layout="constrained")
        for ax in axes.flat:
            ax.axis("off")
        for ax, image in zip(axes.flat, images, strict=False):
            ax.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), vmin=0, vmax=1)
        return fig

    def __repr__(self) -> str:
        K, C, k, _ = self.filters.shape
        return f"Bank({self.name}, {K} filters, {C}x{k}x{k}{'' if self.whitening is None else ', whitened'})"


def unit(filters: Tensor, *, zero_mean: bool = False) -> Tensor:
    """Filters of norm 1, with their mean taken off on demand."""
    flat = filters.flatten(1)
    flat = flat - flat.mean(1, keepdim=True) if zero_mean else flat
    return F.normalize(flat, dim=1).view_as(filters)


def random_bank(
    n_filters: int, size: int, channels: int = 1, *, orthogonal: bool = False, whitening: Whitening | None = None,
    seed: int = 0,
) -> Bank:  # fmt: skip
    """Random directions of norm 1, orthogonal ones in groups of $Ck^2$ on demand."""
    K, d = whole("n_filters", n_filters, 1), whole("channels", channels, 1) * whole("size", size, 1) ** 2
    generator = torch.Generator().manual_seed(seed)
    if orthogonal:
        blocks = torch.linalg.qr(torch.randn(-(-K // d), d, d, generator=generator)).Q
        filters = blocks.reshape(-1, d)[:K]
    else:
        filters = F.normalize(torch.randn(K, d, generator=generator), dim=1)
    return Bank(filters.view(K, channels, size, size), "orthogonal" if orthogonal else "random", whitening)


def _channel_mixes(channels: int) -> Tensor:
    """Grey, and for colours the two opponent mixes, as rows of norm 1."""
    grey = torch.full((1, channels), channels**-0.5)
    if channels != 3:
        return grey
    opponent = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    return torch.cat([grey, F.normalize(opponent, dim=1)])


def gabor_bank(
    size: int, channels: int = 1, *, n_orient: int = 4, n_scales: int = 2, gamma: float = 0.5,
) -> Bank:  # fmt: skip
    """Gabor filters $e^{-(x'^2 + \\gamma^2 y'^2)/2\\sigma^2} \\cos(2\\pi x'/\\lambda + \\psi)$ of zero mean and norm 1.

    Wavelengths go from k/2 (at least 2 pixels, below which they alias) to 1.5 k, $\\sigma = 0.56\\lambda$ up to k/3,
    phases are 0 and $\\pi/2$. The mean is taken off after windowing.

    Args:
        size: side k, at least 3.
        channels: number of channels; with 3, grey and opponent colours.
        n_orient: number of orientations.
        n_scales: number of wavelengths.
        gamma: ratio of the window's widths.

    Returns:
        `n_orient * n_scales * 2` filters for grey, times 3 with colours: grey first.
    """
    k = whole("size", size, 3)
    whole("n_orient", n_orient, 1)
    axis = torch.arange(k) - (k - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    theta = math.pi * torch.arange(n_orient)[:, None, None] / n_orient
    along, across = x * theta.cos() + y * theta.sin(), y * theta.cos() - x * theta.sin()
    maps = []
    for length in torch.linspace(max(2.0, k / 2), 1.5 * k, whole("n_scales", n_scales, 1)).tolist():
        sigma = min(0.56 * length, k / 3)
        window = (-(along.square() + gamma**2 * across.square()) / (2 * sigma**2)).exp()
        maps += [window * (2 * math.pi * along / length + phase).cos() for phase in (0.0, math.pi / 2)]
    grey = unit(torch.cat(maps)[:, None], zero_mean=True)
    return Bank(_colored(grey, channels), "gabor", meta={"n_orient": n_orient, "n_scales": n_scales})


def _colored(grey: Tensor, channels: int) -> Tensor:
    mixes = _channel_mixes(whole("channels", channels, 1))
    return (mixes[:, None, :, None, None] * grey).flatten(0, 1)


def dct_bank(size: int, channels: int = 1, n_filters: int | None = None) -> Bank:
    """Products of cosines (DCT-II) ordered by u + v; all $k^2$ are an orthonormal basis of a channel.

    Args:
        size: side k.
        channels: number of channels; each has its own copy of the basis.
        n_filters: number of filters, the lowest frequencies of all channels first; all $Ck^2$ by default.

    Raises:
        ValueError: if more are asked for than there are.
    """
    k = whole("size", size, 1)
    places = torch.arange(k, dtype=torch.float64)
    basis = (math.pi * (places + 0.5) * places[:, None] / k).cos() * (2 / k) ** 0.5
    basis[0] /= 2**0.5
    order = sorted(((u, v) for u in range(k) for v in range(k)), key=lambda uv: (sum(uv), uv))
    maps = torch.stack([torch.outer(basis[u], basis[v]) for u, v in order])
    filters = torch.einsum("fij,cd->fcdij", maps, torch.eye(channels).double()).flatten(0, 1)
    n_filters = len(filters) if n_filters is None else whole("n_filters", n_filters, 1)
    if n_filters > len(filters):
        raise ValueError(f"expected at most {len(filters)} DCT filters of size {k}, got n_filters={n_filters}")
    return Bank(filters[:n_filters], "dct")


def wavelet_bank(size: int, channels: int = 1, kind: str = "gaussian") -> Bank:
    """Wavelet filters of norm 1.

    Args:
        size: side k; for `"haar"` at best a power of 2, for `"db2"` 4 times one. Filters of the first level stand at the
            centre, and the coarser levels that fit are stretched by 2.
        channels: number of channels; with 3, grey and opponent colours.
        kind: `"gaussian"` (first and second derivatives and the Laplacian of Gaussians, of zero mean), `"haar"` or
            `"db2"` (tensor products of low and high pass).
    """
    k = whole("size", size, 2)
    one_of("kind", kind, ("gaussian", "haar", "db2"))
    maps: list[Tensor] = []
    if kind == "gaussian":
        axis = torch.arange(k) - (k - 1) / 2
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        for sigma in (k / 6, k / 4):
            g = (-(x * x + y * y) / (2 * sigma**2)).exp()
            xx, yy = (x * x / sigma**2 - 1) * g, (y * y / sigma**2 - 1) * g
            maps += [-x * g, -y * g, xx, yy, x * y * g, xx + yy]
        return Bank(_colored(unit(torch.stack(maps)[:, None], zero_mean=True), channels), "wavelet gaussian")
    root3 = 3**0.5
    low = [1.0, 1.0] if kind == "haar" else [1 + root3, 3 + root3, 3 - root3, 1 - root3]
    high = [(-1) ** i * v for i, v in enumerate(reversed(low))]
    if k < len(low):
        raise ValueError(f"expected a size of at least {len(low)} for {kind}, got {k}")
    stretch = 1
    while stretch * len(low) <= k:
        lines = [torch.tensor(v).repeat_interleave(stretch) for v in (low, high)]
        rest = k - len(lines[0])
        lines = [F.pad(line, (rest // 2, rest - rest // 2)) for line in lines]
        maps += [
            torch.outer(a, b)
            for i, a in enumerate(lines)
            for j, b in enumerate(lines)
            if i or j or stretch * 2 * len(low) > k
        ]
        stretch *= 2
    return Bank(_colored(unit(torch.stack(maps)[:, None]), channels), f"wavelet {kind}")
