"""Layers beside `nn.Linear` with ReLU: with as many numbers, and the one that is replaced; and a loop over features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.layers.snnk import SNNK, URF, FourierMeasure
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    torch.manual_seed(0)
    d = 1024
    x = torch.randn(512, d)
    same, small = SNNK(d, d, d // 2, bias=False), SNNK(d, d, d // 4, bias=False)
    linear, narrow = nn.Linear(d, d), nn.Linear(d, d // 4)
    wave = URF(256, 64, FourierMeasure.cos(), radius=1.0)
    xi, G, M, inputs = wave.frequencies, wave.projection, wave.damping, F.normalize(x[:, :256], dim=1)

    def one_by_one() -> Tensor:
        columns = []
        for j in range(64):
            v = torch.sqrt(2j * math.pi * xi[j]) * inputs
            kappa = (1 + 4 * M[j]).sqrt()
            exponent = kappa * (v @ G[j].to(v.dtype)) - M[j] * G[j].square().sum() - (v * v).sum(1) / 2
            columns.append((1 + 4 * M[j]) ** 64 * exponent.exp() / 8)
        return torch.stack(columns, 1)

    with torch.no_grad():
        bench.compare("layer 1024 to 1024, 512 inputs, m = 512: as many numbers in all",
                      ours=lambda: same(x), linear_relu=lambda: linear(x).relu())  # fmt: skip
        bench.compare("layer 1024 to 1024, 512 inputs, m = 256: in place of the layer",
                      ours=lambda: small(x), linear_relu=lambda: linear(x).relu())  # fmt: skip
        bench.compare("Fourier features, 512 x 256, m = 64", ours=lambda: wave(inputs), loop_over_features=one_by_one)

    def step(layer: nn.Module) -> None:
        layer(x).square().mean().backward()

    bench.compare("training step, m = 256, as many trained numbers as 1024 to 256 and the layer replaced",
                  ours=lambda: step(small), linear_relu=lambda: step(nn.Sequential(linear, nn.ReLU())),
                  linear_of_256=lambda: step(narrow))  # fmt: skip
