"""A small convolutional network, and the pieces that others are built of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from torchfolio.models.chain import remembered


def conv_block(in_channels: int, out_channels: int, stride: int = 1, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU, and a 2x2 max pool if asked for."""
    parts: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]
    return nn.Sequential(*parts, nn.MaxPool2d(2, ceil_mode=True)) if pool else nn.Sequential(*parts)


def pooled_head(channels: int, num_classes: int) -> nn.Sequential:
    """Global average pool and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


@remembered
class ConvNet(nn.Sequential):
    """A small convolutional network: `layer1`, …, `layerL` (convolution, batch norm, ReLU, max pool), `head`.

    Args:
        num_classes: width of the output.
        in_channels: channels of the images.
        widths: channels of the layers; each halves the resolution (rounding up).

    Shapes:
        `[B, in_channels, H, W]` to `[B, num_classes]`.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (32, 64, 128)) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for k, width in enumerate(widths, start=1):
            children[f"layer{k}"] = conv_block(channels, width, pool=True)
            channels = width
        children["head"] = pooled_head(channels, num_classes)
        super().__init__(children)
