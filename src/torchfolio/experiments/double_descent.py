"""Measures the peak of double descent over optimisation settings: closed forms, iterated readouts, small networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from torchfolio.experiments._capacity_sweeps import closed_forms, networks, one_setting, readouts, tuned_ridge
from torchfolio.experiments._noisy_labels import noisy_problem
from torchfolio.insight.double_descent import SweepResult, compare, plot_comparison
from torchfolio.runs import Results, Run, pick, plots, setting

INF = math.inf
SIZES = (
    0.1, 0.15, 0.25, 0.375, 0.5, 0.625, 0.75, 0.85, 0.925, 0.975,
    1.0, 1.025, 1.075, 1.15, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0,
)  # fmt: skip
# Closed-form settings on the same features: steps, rate as a share of the default, momentum, scale of initial weights.
CLOSED: dict[str, tuple[float, float, float, float]] = {
    **{f"steps {t:g}": (t, 1.0, 0.0, 0.0) for t in (1e2, 2e2, 1e3, 1e4, 1e6, INF)},
    **{f"rate {share:g}": (1e4, share, 0.0, 0.0) for share in (0.02, 0.1, 0.5)},
    **{f"heavy ball {t:g}": (t, 1.0, 0.9, 0.0) for t in (2e2, 1e3, 1e4)},
    **{f"initial weights {omega:g}": (1e6, 1.0, 0.0, omega) for omega in (0.1, 0.5, 1.0)},
}
FEATURES: dict[str, dict[str, Any]] = {
    "small inputs": {"scale": 0.2},
    "standardized inputs": {"standardize": "inputs"},
    "standardized features": {"standardize": "features"},
    "standardized features, minimum": {"standardize": "features", "steps": INF},
}
APART = ("initial weights 1",)  # its null-space part hides the second descent whatever the training loss is


@dataclass(frozen=True)
class Settings:
    """Data, grids and budgets."""

    data: str = setting("digits", "name of the data set")
    train_size: int = setting(200, "number of training samples")
    noise_rate: float = setting(0.2, "probability that a training label is redrawn; a tenth of them stay as they were")
    scale: float = setting(3.0, "factor of the centred inputs, so that tanh bends")
    sizes: tuple[float, ...] = setting(SIZES, "numbers of features, as shares of the number of samples")
    iterated: tuple[float, ...] = setting(
        (0.1, 0.25, 0.5, 0.85, 1.0, 1.15, 1.5, 2.0, 5.0, 8.0), "sizes for which SGD and Adam are iterated"
    )
    epochs: int = setting(200, "passes of SGD and Adam over the readouts")
    widths: tuple[int, ...] = setting((4, 8, 16, 27, 40, 80, 200), "hidden units of the networks")
    network_steps: int = setting(1500, "number of steps of the networks")


SCALES = {
    "smoke": Settings(
        train_size=60, sizes=(0.1, 0.25, 0.5, 0.85, 1.0, 1.15, 2.0, 8.0), iterated=(0.1, 0.5, 1.0, 2.0, 8.0), epochs=10,
        widths=(4, 16, 27, 40), network_steps=50,
    ),
    "quick": Settings(),
    "full": Settings(data="mnist10k", train_size=1000, widths=(4, 8, 16, 27, 40, 80, 200, 400), network_steps=5000),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Sweep the number of features, then the width of networks."""
    s, problem = run.settings, noisy_problem(run)
    n = s.train_size
    sizes, few = ([round(share * n) for share in shares] for shares in (s.sizes, s.iterated))
    run.arm("closed_form", closed_forms, problem, sizes, CLOSED)
    for name, changes in FEATURES.items():
        run.arm(name, one_setting, problem, sizes, **changes)
    adam, sgd = partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.SGD, lr=0.05)
    for size in (n // 4, n // 20):
        run.arm(f"batch {size}", readouts, problem, few, epochs=s.epochs, batch_size=size)
    run.arm("Adam", readouts, problem, few, epochs=s.epochs, batch_size=n, optimizer=adam)
    run.arm("ridge", tuned_ridge, problem, sizes)
    for name, optimizer in (("network adam", adam), ("network sgd", sgd)):
        run.arm(name, networks, problem, s.widths, s.network_steps, optimizer)
    swept = sweeps(run.arms)
    heights_and_losses(run, swept)
    condition_numbers(run, swept)
    adam, sgd = swept["network adam"], swept["network sgd"]
    top, ratio = adam.peak(), sgd.at(27) / adam.at(27)
    run.values("networks", adam=top.height, width=top.capacity or 0, sgd=sgd.peak().height, loss_ratio=ratio)


def sweeps(arms: Mapping[str, Any]) -> dict[str, SweepResult]:
    """The arms of a seed as sweeps, each setting of the closed forms by itself."""
    import pandas as pd

    closed, columns = arms["closed_form"], ("train_loss", "test_loss", "test_error")
    apart = {name: {column: closed[f"{name}/{column}"] for column in columns} for name in CLOSED}
    tables = {name: {"capacity": closed["capacity"], **table} for name, table in apart.items()}
    tables |= {name: pick(arm, "capacity", *columns) for name, arm in arms.items() if name != "closed_form"}
    return {name: SweepResult(pd.DataFrame(table)) for name, table in tables.items()}


def unified(swept: Mapping[str, SweepResult], threshold: int) -> Any:
    """Height of the peak beside training loss at the threshold, for all settings of optimisation."""
    others = (*APART, "ridge", "network adam", "network sgd")
    return compare({name: sweep for name, sweep in swept.items() if name not in others}, threshold)


def heights_and_losses(run: Run[Settings], swept: Mapping[str, SweepResult]) -> None:
    """The peak of the least-squares solution, of what stops early, and of what is held down by a penalty."""
    n, heights = run.settings.train_size, {name: sweep.peak().height for name, sweep in swept.items()}
    top, losses = swept["steps inf"].peak(), swept["steps inf"].frame["test_loss"].to_numpy()
    far = losses[-1] / losses[: top.index].min()
    run.values("peak", log_height=math.log10(top.height), place=(top.capacity or math.nan) / n, far=far)
    at_threshold = [swept[f"steps {steps:g}"].at(n) for steps in (1e2, 1e3, 1e4, 1e6, INF)]
    times = {"first": "steps 100", "middle": "steps 10000", "late": "steps 1e+06"}
    log_heights = {f"log_{time}": math.log10(heights[name]) for time, name in times.items()}
    run.values("training_time", log_heights, falls=all(a > b for a, b in pairwise(at_threshold)))
    table = unified(swept, n)
    correlation = spearmanr(table["train_loss"], table["height"]).statistic  # pyright: ignore
    run.values("low_loss", correlation=correlation, settings=len(table))
    run.values("negative_control", ridge=heights["ridge"], interpolation=heights["steps inf"])


def condition_numbers(run: Run[Settings], swept: Mapping[str, SweepResult]) -> None:
    """Where the condition number is large, and whether it and the peak move alike."""
    name = "standardized features, minimum"
    plain, scaled = (run.arms[arm]["condition_number"] for arm in ("closed_form", name))
    sizes = swept["steps inf"].frame["capacity"].tolist()
    k, quarter = (sizes.index(share) for share in (run.settings.train_size, run.settings.train_size // 4))
    logs = np.log10(plain)
    rises = {"log_left": logs[k] - logs[quarter], "log_right": logs[k] - logs[-1]}
    run.values("conditioning", rises, at_threshold=np.argmax(plain) == k)
    change = math.log(scaled[k] / plain[k])
    effect = math.log(swept[name].peak().height / swept["steps inf"].peak().height)
    run.values("standardization", same=change * effect > 0, log_condition=change, log_height=effect)


def figures(results: Results) -> plots.Figures:
    """The unified view of the first seed, and test losses of the closed forms."""
    table = unified(sweeps(results.arms[0]), results.settings.train_size)
    lines = {name: ("closed_form", f"{name}/test_loss") for name in CLOSED if name.startswith("steps")}
    sizes = results.arms[0]["ridge"]["capacity"]
    own: dict[str, Any] = {"xlabel": "features", "ylabel": "test loss", "logx": True, "logy": True}
    curves = plots.curves(results, {**lines, "tuned ridge": ("ridge", "test_loss")}, x=sizes, **own)
    return {"unified view": plot_comparison(table), "training time": curves}
