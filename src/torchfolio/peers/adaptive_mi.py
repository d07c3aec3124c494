"""The kernel estimate of a wide layer, and the same by a quadratic form in NumPy."""

from __future__ import annotations

import numpy as np
import torch

from torchfolio.insight.adaptive_mi import kde_information
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    t = torch.rand(4096, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, variance = t.numpy(), 1e-3

    def form() -> float:
        squares = (rows * rows).sum(1)
        distances = squares[:, None] + squares[None] - 2 * rows @ rows.T
        return float(-np.log2(np.exp(distances / (-2 * variance)).mean(1)).mean())

    bench.compare("kernels of 4,096 x 100", repeats=5, ours=lambda: kde_information(t, variance), numpy=form)
