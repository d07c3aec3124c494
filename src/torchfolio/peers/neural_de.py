"""A small field over 30 outputs with torchdiffeq, and a sweep of Brownian increments with torchsde."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics import neural_de as de
from torchfolio.dynamics.vector_fields import VectorField


def peers(bench: Any) -> None:
    import torchdiffeq  # pyright: ignore[reportMissingImports]
    import torchsde  # pyright: ignore[reportMissingImports]

    field, y0, ts = VectorField(4, 64), torch.randn(64, 4), torch.linspace(0, 10, 30)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}

    def train(solve: Callable[[Tensor], Any]) -> None:
        solve(y0.clone().requires_grad_()).square().mean().backward()

    theirs: dict[str, Any] = {"method": "dopri5", **tolerance}
    options = {"norm": "seminorm"}
    bench.compare(
        "dopri5, backpropagated",
        ours=lambda: train(lambda y: de.odeint(field, y, ts, de.Dopri5(), de.Direct(), **tolerance).ys),
        torchdiffeq=lambda: train(lambda y: torchdiffeq.odeint(field, y, ts, **theirs)),
    )
    bench.compare(
        "dopri5, adjoint with seminorm",
        ours=lambda: train(lambda y: de.odeint(field, y, ts, de.Dopri5(), de.Adjoint(), **tolerance).ys),
        torchdiffeq=lambda: train(
            lambda y: torchdiffeq.odeint_adjoint(field, y, ts, **theirs, adjoint_options=options)
        ),
    )
    n, shape = 1000, (128, 4)

    def sweep(w: Any) -> None:
        for k in [*range(n), *reversed(range(n))]:
            w(k / n, (k + 1) / n)

    def peer() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sweep(torchsde.BrownianInterval(0.0, 1.0, size=shape, entropy=0, dt=1 / n))

    grid = [k / n for k in range(n + 1)]
    bench.compare(
        "Brownian grid, 1,000 steps there and back", ours=lambda: sweep(de.BrownianGrid(grid, shape)), torchsde=peer
    )
    bench.compare(
        "Brownian interval, 1,000 steps there and back",
        ours=lambda: sweep(de.BrownianInterval(0, 1, shape)),
        torchsde=peer,
    )
