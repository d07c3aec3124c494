"""Bounds by receptive fields are those of whole layers, and hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torchfolio.robustness import preactivation_bounds
from torchfolio.robustness.bounds import ElementwiseAffine, Layers, Residual, activation_ranges, linear_bounds
from torchfolio.robustness.properties import Box


def windowed(name: str) -> tuple[nn.Sequential, tuple[int, ...]]:
    conv = nn.Conv2d
    nets: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
        "strides and dilation": (
            [conv(2, 4, 4, 2, 1), nn.ReLU(), conv(4, 4, 3, (2, 1), (1, 2), (1, 2), 2), nn.Tanh(), conv(4, 2, 2), nn.Sigmoid(),
             nn.AdaptiveAvgPool2d(1)], (2, 16, 18)),
        "norms and pools": (
            [conv(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.AvgPool2d(3, 1, 1), nn.ReLU(), conv(3, 3, 3, bias=False),
             ElementwiseAffine(torch.rand(3, 1, 1), torch.rand(1, 10, 10)), nn.ReLU(), nn.AvgPool2d(2), conv(3, 2, 2), nn.ReLU()],
            (1, 12, 12)),
        "windows that become wide": (
            [conv(1, 3, 3, padding=1), nn.ReLU(), conv(3, 3, 3, 2, 1), nn.ReLU(), conv(3, 3, 3, 1, 1), nn.ReLU()], (1, 10, 10)),
        "a sum below": (
            [Residual(nn.Sequential(conv(2, 2, 3, padding=1), nn.ReLU(), conv(2, 2, 1))), nn.ReLU(), conv(2, 3, 3), nn.ReLU()],
            (2, 8, 8)),
        "a max pool below": ([conv(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh(), conv(3, 3, 2), nn.ReLU()], (1, 14, 14)),
    }  # fmt: skip
    layers, shape = nets[name]
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.Flatten()).double().eval().requires_grad_(False)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean, part.running_var = torch.randn(3).double(), torch.rand(3).double() + 0.5
    return net, shape


WINDOWED = ["strides and dilation", "norms and pools", "windows that become wide", "a sum below", "a max pool below"]


@pytest.mark.parametrize("rounding", [0.0, 1e-4])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_bound_as_whole_layers_do(name, rounding):
    net, shape = windowed(name)
    layers = Layers(net, shape)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)).double()
    box = Box.ball(x, 0.05)
    ranges, terms = activation_ranges(layers, box, "crown", rounding=rounding)
    compared = 0
    for k in ranges:
        if preactivation_bounds._plan(layers, k)[0] == k:
            continue
        everything = torch.ones(math.prod(layers.shapes[k]), dtype=torch.bool)
        arguments = (ranges, box, terms, rounding)
        by_units = list(preactivation_bounds._by_units(layers, k, everything.nonzero()[:, 0], *arguments))
        by_windows = list(preactivation_bounds._by_windows(layers, k, everything, *arguments))
        for end in (1, 2):
            units, windows = (torch.cat([part[end] for part in parts], 1) for parts in (by_units, by_windows))
            order = torch.cat([part[0] for part in by_windows]).argsort()
            torch.testing.assert_close(windows[:, order], units, rtol=1e-9, atol=1e-9)
        compared += 1
    assert compared
    points = box.lower + (box.upper - box.lower) * torch.rand(50, *box.lower.shape).double()
    out = net(points.flatten(0, 1)).view(50, 2, -1)
    low, high = layers_ends(layers, box, ranges)
    assert (out >= low - 1e-9).all()
    assert (out <= high + 1e-9).all()


def layers_ends(layers: Layers, box: Box, ranges: dict) -> tuple[Tensor, Tensor]:
    count = math.prod(layers.outputs)
    rows = torch.cat([torch.eye(count), -torch.eye(count)]).double().view(1, 2 * count, *layers.outputs)
    bound, _, _ = linear_bounds(layers, len(layers.parts), rows, ranges, box)
    return bound[:, :count], -bound[:, count:]
