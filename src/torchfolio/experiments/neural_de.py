"""Measures neural differential equations: solvers, gradients, Brownian motion, formulas from a learned field, irregular
series, latent SDEs and implicit layers. The parts stand in files of their own beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchfolio.experiments._implicit_layers import implicit_layers
from torchfolio.experiments._irregular_series import SERIES, classify, latent
from torchfolio.experiments._oscillator_formulas import formulas_of_an_oscillator
from torchfolio.experiments._solver_accuracy import brownian, gradients, orders
from torchfolio.runs import Results, Run, pick, plots, setting, threads

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """Sizes."""

    steps: int = setting(200, "steps over which gradients are compared")
    seeds: int = setting(10_000, "seeds over which the law of Brownian increments is measured")
    paths: int = setting(2000, "paths of the Ornstein-Uhlenbeck process, and of geometric Brownian motion")
    trajectories: int = setting(64, "trajectories of the oscillator")
    ode_steps: int = setting(
        400, "evaluations when the neural ODE is trained, three quarters of them on the first tenth of the horizon"
    )
    points: int = setting(400, "visited states on which formulas are searched")
    populations: int = setting(16, "populations of the search")
    rounds: int = setting(10, "rounds of the search")
    tune_steps: int = setting(30, "evaluations when the formulas' constants are tuned")
    series: int = setting(256, "series of each of training and test set")
    length: int = setting(24, "points of a series")
    cde_steps: int = setting(120, "training steps of a neural CDE")
    latent_steps: int = setting(60, "training steps of the latent SDE")
    deq_steps: int = setting(150, "training steps of the equilibrium network, and of the weight-tied one beside it")


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
        run.values("symbolic", **pick(found, "recovered", "constants_off", "shuffled_score"))
        scores = {name: run.arm(name, classify, s, *arm)["accuracy"] for name, arm in SERIES.items()}
        run.values("irregular_series", **scores)
        run.arm("latent", latent, s, seed)
        run.values("implicit_layers", **run.arm("implicit", implicit_layers, run.data("digits"), s.deq_steps, seed))


def figures(results: Results) -> plots.Figures:
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
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for seed, arms in zip(results.seeds, results.arms, strict=True):
        ax.semilogy(np.asarray(arms["formulas"]["losses"]), lw=1, label=f"seed {seed}")
    ax.set(xlabel="evaluation", ylabel="loss")
    ax.legend(fontsize=8)
    return fig
