"""A training step of one convolution with ReLU, against the ordinary one and against three separate ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.layers.quadratic import QuadraticConv2d
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32, 16, 16)
    ordinary, ours = nn.Conv2d(32, 32, 3, padding=1), QuadraticConv2d(32, 32, 3, padding=1)
    r, g, b = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))

    def step(forward) -> None:
        F.relu(forward(x.requires_grad_())).sum().backward()

    bench.compare(
        "step of a 3x3 convolution, 64 x 32 x 16 x 16",
        ours=lambda: step(ours),
        three_convolutions=lambda: step(lambda x: r(x) * g(x) + b(x**2)),
        ordinary_layer=lambda: step(ordinary),
    )
