"""Two networks of binary convolutions, real in their first convolution and their head, and what packing them gives."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import one_of
from torchfolio.data import DataSplits
from torchfolio.efficiency.binary import BinaryLayer, export_binary, load_binary

__all__ = ["network", "packed"]


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


def network(name: str, data: DataSplits, widths: tuple[int, ...], conv: Callable[..., BinaryLayer]) -> nn.Module:
    """`"plain"` or `"resnet20"`, with binary convolutions of a kind."""
    make = {"plain": plain, "resnet20": resnet20}[one_of("network", name, ("plain", "resnet20"))]
    return make(data, widths, conv)


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


def packed(net: nn.Module, data: DataSplits) -> dict[str, float]:
    """Size of the packed layers against float32, and what packing changes of the outputs."""
    net.eval()
    exported = export_binary(net)
    again = load_binary(copy.deepcopy(net), exported).eval()
    x = data.test.tensors[0][:200].to(next(net.parameters()).device)
    with torch.no_grad():
        difference = float((net(x) - again(x)).abs().max())
    real = sum(4 * m.weight.numel() for m in net.modules() if isinstance(m, BinaryLayer))
    bits = sum(t.numel() for name, t in exported.items() if name.endswith(".bits"))
    scales = sum(4 * t.numel() for name, t in exported.items() if name.endswith(".alpha"))
    return {"weights_ratio": real / bits, "layers_ratio": (real + scales) / (bits + scales),
            "logit_difference": difference}  # fmt: skip
