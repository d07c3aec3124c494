"""Measures memorisation, grokking and what explains them on XOR clusters, with three controls where parts of it fail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from torchfolio.experiments._descent_on_weights import differences
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.theory.xor_clusters import XORClusters
from torchfolio.theory.xor_grokking import DualGD, XORNetwork, grokking_time, xor_clusters


@dataclass(frozen=True)
class Settings:
    """One simulation, of which the arms change a setting each."""

    n: int = setting(200, "number of training points")
    p: int = setting(20_000, "dimension of the points")
    width: int = setting(200, "number of neurons")
    square_mu: float = setting(500.0, "squared norm of the means")
    noise_rate: float = setting(0.1, "share of labels that are flipped")
    lr: float = setting(5e-5, "step size")
    init: float = setting(1e-4, "standard deviation of the initial weights over the learning rate")
    steps: int = setting(20, "number of steps")
    test_size: int = setting(1000, "number of test points")
    balanced: bool = setting(True, "whether clusters have equal numbers of points and flips")
    linear: bool = setting(False, "whether the activation is left out")
    train_output: bool = setting(False, "whether the output weights are trained too")
    weak: tuple[float, ...] = setting(
        (40_000, 60.0, 1000), "dimension, squared norm of the means, and steps of the weak-signal control"
    )
    strong: float = setting(2000.0, "squared norm of the means in the strong-signal control")
    wide: int = setting(2000, "number of neurons of the wide arm")
    sweep_square_mu: tuple[float, ...] = setting((), "squared norms of the means for further arms")
    sweep_noise_rate: tuple[float, ...] = setting((), "shares of flipped labels for further arms")
    sweep_init: tuple[float, ...] = setting((1.0, 100.0), "values of `init` for further arms")


SCALES = {
    "smoke": Settings(
        n=100, p=8000, width=100, square_mu=400.0, weak=(16_000, 30.0, 100), strong=1500.0, wide=400, sweep_init=(),
    ),
    "quick": Settings(),
    "full": Settings(
        n=400, p=40_000, square_mu=800.0, weak=(80_000, 60.0, 1000), strong=4000.0,
        sweep_square_mu=(50.0, 100.0, 200.0, 400.0, 1600.0), sweep_noise_rate=(0.0, 0.05, 0.2, 0.3),
        sweep_init=(1e-2, 1.0, 10.0, 100.0),
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Simulate the paper's setting, the controls, and the variants that its reviewers asked for."""
    base = run.settings
    relu = run.arm("relu", simulate, run, base)
    train, test, odd = relu["train_accuracy"], relu["test_accuracy"], relu["odd_energy"]
    run.values("memorization", train=train[1], test=test[1], within=float(0.40 <= test[1] <= 0.60))
    run.values("grokking", train=train[15], test=test[15], within=float(test[15] >= 0.95))
    run.values("odd_energy", first=odd[1], last=odd[15])
    aligned, own, other = relu["aligned"], relu["own_cosine"], relu["other_cosine"]
    run.values("feature_learning", first=aligned[1], aligned=aligned[10], own=own[15], other=other[15])
    run.values("exactness", **run.arm("autograd", differences))
    linear = run.arm("linear", simulate, run, replace(base, linear=True))
    later = linear["test_accuracy"][1:]
    run.values("control_linear", train=linear["train_accuracy"][1:].min(), lowest=later.min(), highest=later.max())
    p, square_mu, steps = base.weak
    weak = run.arm("weak_signal", simulate, run, replace(base, p=int(p), square_mu=square_mu, steps=int(steps)))
    run.values("control_weak_signal", train=weak["train_accuracy"][-1], highest=weak["test_accuracy"][1:].max())
    strong = run.arm("strong_signal", simulate, run, replace(base, square_mu=base.strong))
    run.values("control_strong_signal", train=strong["train_accuracy"][5], test=strong["test_accuracy"][5])
    # Nothing is claimed of these.
    for name, settings in variants(base).items():
        run.arm(name, simulate, run, settings)


def variants(base: Settings) -> dict[str, Settings]:
    """Arms that change one setting, by name."""
    return {
        "independent_draw": replace(base, balanced=False),
        "trained_output": replace(base, train_output=True),
        "wide": replace(base, width=base.wide),
        **{f"square_mu_{value:g}": replace(base, square_mu=value) for value in base.sweep_square_mu},
        **{f"noise_rate_{value:g}": replace(base, noise_rate=value) for value in base.sweep_noise_rate},
        **{f"init_{value:g}": replace(base, init=value) for value in base.sweep_init},
    }


def problem(settings: Settings, seed: int, device: Any = None) -> tuple[XORClusters, XORClusters, XORNetwork]:
    """Training and test data, and the network; arms of a seed draw alike where their shapes are alike."""
    generator, mu = torch.Generator().manual_seed(seed), settings.square_mu**0.5
    draw = {"balanced": settings.balanced, "generator": generator, "device": device}
    train = xor_clusters(settings.n, settings.p, mu, settings.noise_rate, **draw)
    test = xor_clusters(settings.test_size, settings.p, mu, **draw)
    activation = torch.nn.Identity() if settings.linear else torch.relu
    own = {"activation": activation, "train_output": settings.train_output, "generator": generator, "device": device}
    return train, test, XORNetwork(settings.p, settings.width, settings.init * settings.lr, **own)


def simulate(run: Run[Settings], settings: Settings) -> dict[str, Any]:
    """Diagnostics of every step, and the neurons in the plane of the means after the first step and at the end."""
    train, test, network = problem(settings, run.seed, run.device)
    seen = DualGD(train, network, settings.lr).run(settings.steps, test)
    columns: dict[str, Any] = {str(name): column.to_numpy() for name, column in seen.frame.items()}
    fit, grokked = seen.fit_time, grokking_time(seen)
    scalars = {"last_train": columns["train_accuracy"][-1], "last_test": columns["test_accuracy"][-1]}
    times = {"fit_time": -1 if fit is None else fit, "grokking_time": -1 if grokked is None else grokked}
    return {**columns, **scalars, **times, "neurons": seen.neurons[[1, -1]], "a": seen.a}


def figures(results: Results) -> plots.Figures:
    """Accuracies and odd energy over steps, test accuracy of every arm, and the first seed's neurons."""
    from matplotlib import pyplot as plt

    main = {name: ("relu", name) for name in ("train_accuracy", "test_accuracy", "odd_energy")}
    arms = {name: (name, "test_accuracy") for name in results.arms[0] if name not in ("autograd", "weak_signal")}
    steps = range(results.settings.steps + 1)
    first = results.arms[0]["relu"]
    neurons, axes = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
    for ax, points, title in zip(axes, np.asarray(first["neurons"]), ("after a step", "at the end"), strict=True):
        ax.scatter(*points.T, c=np.where(np.asarray(first["a"]) > 0, "C0", "C3"), s=8)
        ax.set(title=title, xlabel="along μ₁", ylabel="along μ₂")
        ax.axis("equal")
    return {
        "trajectory": plots.curves(results, main, x=steps, xlabel="step", ylabel="share"),
        "arms": plots.curves(results, arms, x=steps, xlabel="step", ylabel="clean test accuracy"),
        "neurons": neurons,
    }
