"""Measures neural differential equations: solvers, gradients, Brownian motion, formulas from a learned field, irregular
series, latent SDEs and implicit layers. The parts stand in files of their own beside this one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from torchfolio.dynamics import neural_de as de
from torchfolio.dynamics.vector_fields import VectorField
from torchfolio.experiments._implicit_layers import implicit_layers
from torchfolio.experiments._irregular_series import SERIES, classify, latent
from torchfolio.experiments._oscillator_formulas import formulas_of_an_oscillator
from torchfolio.experiments._solver_accuracy import brownian, gradients, orders
from torchfolio.runs import Results, Run, plots, threads


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        steps: steps over which gradients are compared.
        seeds: seeds over which the law of Brownian increments is measured.
        paths: paths of the Ornstein-Uhlenbeck process, and of geometric Brownian motion.
        trajectories: trajectories of the oscillator.
        ode_steps: evaluations when the neural ODE is trained, three quarters of them on the first tenth of the horizon.
        points: visited states on which formulas are searched.
        populations: populations of the search.
        rounds: rounds of the search.
        tune_steps: evaluations when the formulas' constants are tuned.
        series: series of each of training and test set.
        length: points of a series.
        cde_steps: training steps of a neural CDE.
        latent_steps: training steps of the latent SDE.
        deq_steps: training steps of the equilibrium network, and of the weight-tied one beside it.
    """

    steps: int = 200
    seeds: int = 10_000
    paths: int = 2000
    trajectories: int = 64
    ode_steps: int = 400
    points: int = 400
    populations: int = 16
    rounds: int = 10
    tune_steps: int = 30
    series: int = 256
    length: int = 24
    cde_steps: int = 120
    latent_steps: int = 60
    deq_steps: int = 150


SCALES = {
    "smoke": Settings(100, 200, 200, 8, 10, 100, 3, 2, 4, 32, 8, 6, 4, 6),
    "quick": Settings(),
    "full": Settings(
        trajectories=256,
        ode_steps=2000,
        populations=100,
        tune_steps=500,
        cde_steps=600,
        latent_steps=1000,
        deq_steps=500,
    ),
}


def run(run: Run[Settings]) -> None:
    """Everything on one thread: the networks are small."""
    s, seed = run.settings, run.seed
    with threads(1):
        run.values("order", **run.arm("order", orders))
        run.values("exact_gradient", **run.arm("gradients", gradients, s.steps, seed))
        run.values("brownian_motion", **run.arm("brownian", brownian, s.seeds, s.paths, seed))
        found = run.arm("formulas", formulas_of_an_oscillator, s, seed)
        run.values("symbolic", **{name: found[name] for name in ("recovered", "constants_off", "shuffled_score")})
        scores = {name: run.arm(name, classify, s, *arm)["accuracy"] for name, arm in SERIES.items()}
        run.values("irregular_series", **scores)
        run.arm("latent", latent, s, seed)
        run.values("implicit_layers", **run.arm("implicit", implicit_layers, run.data("digits"), s.deq_steps, seed))


def figures(results: Results) -> dict[str, Figure]:
    """Training losses of the parts, and the latent SDE beside its data."""
    curves = {
        name: (name, "losses") for name in ("spirals", "speeds", "speeds_without_time", "starts_with_fixed_start")
    }
    latent = {"data": ("latent", "data"), "prior of the latent SDE": ("latent", "model")}
    return {
        "neural CDE": plots.curves(results, curves, xlabel="step", ylabel="loss"),
        "neural ODE": _oscillator_losses(results),
        "latent SDE": plots.curves(results, latent, xlabel="mean at 11 times, then deviation", ylabel="value"),
    }


def _oscillator_losses(results: Results) -> Figure:
    """One line a seed: line searches end after different numbers of evaluations."""
    fig, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for seed, arms in zip(results.seeds, results.arms, strict=True):
        ax.semilogy(np.asarray(arms["formulas"]["losses"]), lw=1, label=f"seed {seed}")
    ax.set(xlabel="evaluation", ylabel="loss")
    ax.legend(fontsize=8)
    return fig


def peers(bench: Any) -> None:
    """A small field over 30 outputs with torchdiffeq, and a sweep of Brownian increments with torchsde."""
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
