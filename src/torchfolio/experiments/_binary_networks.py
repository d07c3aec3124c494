"""Two networks of binary convolutions, real in their first convolution and their head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.efficiency.binary import BinaryLayer

__all__ = ["plain", "resnet20"]


class BinaryUnit(nn.Module):
    """Binary convolution, batch norm, a shortcut around both, hardtanh; the shortcut pools and pads with zeros."""

    def __init__(self, conv: Callable[..., BinaryLayer], in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.stride, self.missing = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        return F.hardtanh(self.norm(self.conv(x)) + F.pad(shortcut, (0, 0, 0, 0, 0, self.missing)))


def plain(data: DataSplits, widths: tuple[int, ...], conv: Callable[..., BinaryLayer]) -> nn.Module:
    """Two binary convolutions and a max pool for every width after the first, the stem's."""
    width, side = widths[0], data.shape[-1]
    parts = OrderedDict(stem=_stem(data, width))
    for wanted in widths[1:]:
        for pool in (False, True):
            layer = conv(width, wanted, 3, padding=1, bias=False)
            pooled = [nn.MaxPool2d(2)] if pool else []
            parts[f"layer{len(parts)}"] = nn.Sequential(layer, *pooled, nn.BatchNorm2d(wanted), nn.Hardtanh())
            width = wanted
        side //= 2
    parts["head"] = nn.Sequential(nn.Flatten(), nn.Linear(width * side * side, data.num_classes))
    return nn.Sequential(parts)


def resnet20(data: DataSplits, widths: tuple[int, ...], conv: Callable[..., BinaryLayer]) -> nn.Module:
    """Three stages of six binary convolutions with a shortcut around each."""
    width = widths[0]
    parts = OrderedDict(stem=_stem(data, width))
    for stage, wanted in enumerate(widths):
        for k in range(6):
            parts[f"unit{len(parts)}"] = BinaryUnit(conv, width, wanted, 2 if stage and not k else 1)
            width = wanted
    parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, data.num_classes))
    return nn.Sequential(parts)


def _stem(data: DataSplits, width: int) -> nn.Module:
    real = nn.Conv2d(data.shape[0], width, 3, padding=1, bias=False)
    return nn.Sequential(real, nn.BatchNorm2d(width), nn.Hardtanh())
