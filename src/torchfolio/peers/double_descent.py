"""Gradient descent in closed form against the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.insight.double_descent import gradient_descent_path, sgd_rate


def peers(bench: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in (200, 1600):
        Z = torch.randn(200, p, generator=generator, dtype=torch.float64)
        Y = torch.randn(200, 10, generator=generator, dtype=torch.float64)

        def loop(Z: Tensor = Z, Y: Tensor = Y) -> Tensor:
            weight, rate = torch.zeros(Z.shape[1], Y.shape[1]).to(Z), sgd_rate(Z, len(Z)) / len(Z)
            for _ in range(10_000):
                weight -= rate * (Z.T @ (Z @ weight - Y))
            return weight

        ours = lambda Z=Z, Y=Y: gradient_descent_path(Z, Y, 10_000).weights(10_000)  # noqa: E731
        bench.compare(f"weights after 10,000 steps, 200 x {p}, 10 outputs", repeats=3, ours=ours, loop=loop)
