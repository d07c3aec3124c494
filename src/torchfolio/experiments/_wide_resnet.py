"""A wide residual network with activation before convolution.

Reference: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, table 1.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["wide_resnet"]


class PreActivation(nn.Module):
    """Batch norm and ReLU before each of two convolutions, around a shortcut of the activated input."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        return self.conv2(self.norm2(self.conv1(y)).relu()) + (x if self.project is None else self.project(y))


def wide_resnet(in_channels: int, num_classes: int, width: int, blocks: int) -> nn.Sequential:
    """A stem of 16 channels, three stages, a classifier without bias.

    Args:
        in_channels: channels of the images.
        num_classes: number of classes.
        width: factor on the widths 16, 32, 64 of the stages.
        blocks: residual blocks of a stage.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)]
    channels = 16
    for stage, base in enumerate((16, 32, 64)):
        for k in range(blocks):
            layers.append(PreActivation(channels, base * width, 2 if stage and not k else 1))
            channels = base * width
    head = nn.Linear(channels, num_classes, bias=False)
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
