"""Residual networks for small images, in the 6n+2 layout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.models.chain import remembered

Shortcut = Literal["A", "B"]


class Subsample(nn.Module):
    """The parameter-free shortcut: every `stride`-th position, new channels filled with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = out_channels - in_channels
        self.padding = (missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, *self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut: $\\operatorname{relu}(F(x) + s(x))$.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and the shortcut.
        shortcut: kind of shortcut where the shape changes: `"A"` subsamples and pads with zero channels (no
            parameters), `"B"` projects by a 1x1 convolution with batch norm.

    Shapes:
        `[B, in_channels, H, W]` to `[B, out_channels, ceil(H / stride), ceil(W / stride)]`.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, figure 2 and section 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, shortcut: Shortcut = "A") -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"expected shortcut 'A' or 'B', got {shortcut!r}")
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        # A module, so that conversions find it; out of place, since the result may be detached and read again
        # while its graph is alive.
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            if shortcut == "A" and in_channels <= out_channels:
                self.shortcut = Subsample(in_channels, out_channels, stride)
            else:
                project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
                self.shortcut = nn.Sequential(project, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


@remembered
class ResNetCIFAR(nn.Sequential):
    """The residual network for 32x32 images: a stem, three stages of $n$ blocks, a pooled linear head.

    The children `stem`, `block1`, …, `block3n`, `head` run in order.

    Args:
        depth: $6n + 2$ weight layers.
        widths: channels of the stages; every stage but the first halves the resolution.
        num_classes: width of the output.
        in_channels: channels of the images.
        shortcut: kind of shortcut, see `BasicBlock`.

    Raises:
        ValueError: if `depth` is not 6n+2 with n of at least 1, or there are not three widths.

    Shapes:
        `[B, in_channels, H, W]` to `[B, num_classes]`.

    Reference:
        He et al., CVPR 2016, section 4.2. With the defaults, depths 20, 32, 44, 56, 110 have 0.27, 0.46, 0.66, 0.85,
        1.73 million parameters.
    """

    def __init__(
        self,
        depth: int = 20,
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Shortcut = "A",
    ) -> None:
        n, rest = divmod(depth - 2, 6)
        if rest or n < 1:
            raise ValueError(f"expected a depth of 6n+2 (8, 14, 20, 32, 44, 56, 110, …), got {depth}")
        if len(widths) != 3:
            raise ValueError(f"expected three widths, one a stage, got {tuple(widths)}")
        children: OrderedDict[str, nn.Module] = OrderedDict()
        conv = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        children["stem"] = nn.Sequential(conv, nn.BatchNorm2d(widths[0]), nn.ReLU())
        channels = widths[0]
        for stage, width in enumerate(widths):
            for k in range(n):
                stride = 2 if stage > 0 and k == 0 else 1
                children[f"block{stage * n + k + 1}"] = BasicBlock(channels, width, stride, shortcut)
                channels = width
        children["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        super().__init__(children)
        self.depth = depth
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet20(**kwargs: object) -> ResNetCIFAR:
    """ResNet-20 for small images; arguments of `ResNetCIFAR`."""
    return ResNetCIFAR(20, **kwargs)  # pyright: ignore[reportArgumentType]


def resnet32(**kwargs: object) -> ResNetCIFAR:
    """ResNet-32 for small images; arguments of `ResNetCIFAR`."""
    return ResNetCIFAR(32, **kwargs)  # pyright: ignore[reportArgumentType]


def resnet44(**kwargs: object) -> ResNetCIFAR:
    """ResNet-44 for small images; arguments of `ResNetCIFAR`."""
    return ResNetCIFAR(44, **kwargs)  # pyright: ignore[reportArgumentType]


def resnet56(**kwargs: object) -> ResNetCIFAR:
    """ResNet-56 for small images; arguments of `ResNetCIFAR`."""
    return ResNetCIFAR(56, **kwargs)  # pyright: ignore[reportArgumentType]


def resnet110(**kwargs: object) -> ResNetCIFAR:
    """ResNet-110 for small images; arguments of `ResNetCIFAR`."""
    return ResNetCIFAR(110, **kwargs)  # pyright: ignore[reportArgumentType]


def parameter_count(model: nn.Module) -> int:
    """Number of trainable numbers in a model, shared ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters() if p.requires_grad}.values())


__all__ = ["BasicBlock", "ResNetCIFAR", "parameter_count", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
