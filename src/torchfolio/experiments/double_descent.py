"""Measures the peak of double descent over optimisation settings: closed forms, iterated readouts, and small networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from torchfolio.experiments._capacity_sweeps import closed_forms, networks, one_setting, readouts, tuned_ridge
from torchfolio.experiments._noisy_labels import noisy_problem
from torchfolio.insight.double_descent import SweepResult, compare, peak, plot_comparison
from torchfolio.runs import Results, Run, pick, plots, setting

INF = math.inf
# Closed-form settings on the same features: steps, rate as a share of the default, momentum, scale of initial weights.
CLOSED: dict[str, tuple[float, float, float, float]] = {
    **{f"steps {t:g}": (t, 1.0, 0.0, 0.0) for t in (1e2, 2e2, 1e3, 1e4, 1e6, INF)},
    **{f"rate {share:g}": (1e4, share, 0.0, 0.0) for share in (0.02, 0.1, 0.5)},
    **{f"heavy ball {t:g}": (t, 1.0, 0.9, 0.0) for t in (2e2, 1e3, 1e4)},
    **{f"initial weights {omega:g}": (1e6, 1.0, 0.0, omega) for omega in (0.1, 0.5, 1.0)},
}
APART = ("initial weights 1",)  # its null-space part hides the second descent whatever the training loss is


@dataclass(frozen=True)
class Settings:
    """Data, grids and budgets."""

    data: str = setting("digits", "name of the data set")
    train_size: int = setting(200, "number of training samples")
    noise_rate: float = setting(
        0.2, "probability with which a training label is redrawn from all classes (a tenth of them stay)"
    )
    scale: float = setting(3.0, "factor of the centred inputs, so that tanh bends")
    sizes: tuple[float, ...] = setting(
        (
            *(0.1, 0.15, 0.25, 0.375, 0.5, 0.625, 0.75, 0.85, 0.925, 0.975),
            *(1.0, 1.025, 1.075, 1.15, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0),
        ),
        "numbers of features, as shares of the number of samples",
    )
    iterated: tuple[float, ...] = setting(
        (0.1, 0.25, 0.5, 0.85, 1.0, 1.15, 1.5, 2.0, 5.0, 8.0), "settings for which SGD and Adam are iterated"
    )
    epochs: int = setting(200, "passes of SGD and Adam over the readouts")
    widths: tuple[int, ...] = setting((4, 8, 16, 27, 40, 80, 200), "hidden units of the networks")
    network_steps: int = setting(1500, "number of steps of the networks")


SCALES = {
    "smoke": Settings(
        train_size=60,
        sizes=(0.1, 0.25, 0.5, 0.85, 1.0, 1.15, 2.0, 8.0),
        iterated=(0.1, 0.5, 1.0, 2.0, 8.0),
        epochs=10,
        widths=(4, 16, 27, 40),
        network_steps=50,
    ),
    "quick": Settings(),
    "full": Settings(data="mnist10k", train_size=1000, widths=(4, 8, 16, 27, 40, 80, 200, 400), network_steps=5000),
}


def run(run: Run[Settings]) -> None:
    """Sweep the number of features, then the width of networks."""
    s, problem = run.settings, noisy_problem(run)
    n = s.train_size
    sizes, widths = ([round(share * n) for share in shares] for shares in (s.sizes, s.iterated))
    closed = run.arm("closed_form", closed_forms, problem, sizes, CLOSED)
    arms: dict[str, dict[str, Any]] = {}
    for name in CLOSED:
        arms[name] = {column: closed[f"{name}/{column}"] for column in ("train_loss", "test_loss", "test_error")}
        arms[name]["capacity"] = closed["capacity"]
    variants: dict[str, dict[str, Any]] = {
        "small inputs": {"scale": 0.2},
        "standardized inputs": {"standardize": "inputs"},
        "standardized features": {"standardize": "features"},
        "standardized features, minimum": {"standardize": "features", "steps": INF},
    }
    for name, changes in variants.items():
        arms[name] = run.arm(name, one_setting, problem, sizes, **changes)
    adam, sgd = partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.SGD, lr=0.05)
    iterated: dict[str, Any] = {f"batch {n // share}": {"batch_size": n // share} for share in (4, 20)}
    iterated["Adam"] = {"optimizer": adam, "batch_size": n}
    for name, how in iterated.items():
        arms[name] = run.arm(name, readouts, problem, widths, epochs=s.epochs, **how)
    ridge = run.arm("ridge", tuned_ridge, problem, sizes)
    trained = {
        name: run.arm(f"network {name}", networks, problem, s.widths, s.network_steps, make)
        for name, make in (("adam", adam), ("sgd", sgd))
    }
    _claims(run, arms, closed["condition_number"], ridge, trained)


def result(arm: Mapping[str, Any]) -> SweepResult:
    """An arm as a sweep."""
    import pandas as pd

    return SweepResult(pd.DataFrame(pick(arm, "capacity", "train_loss", "test_loss", "test_error")))


def _claims(
    run: Run[Settings], arms: dict[str, dict[str, Any]], condition: np.ndarray, ridge: Any, networks: dict[str, Any]
) -> None:
    n, sweeps = run.settings.train_size, {name: result(arm) for name, arm in arms.items()}
    heights = {name: sweep.peak().height for name, sweep in sweeps.items()}
    exact, top = sweeps["steps inf"].frame, sweeps["steps inf"].peak()
    losses = exact["test_loss"].to_numpy()
    far = losses[-1] / losses[: top.index].min()
    run.values("peak", log_height=math.log10(heights["steps inf"]), place=(top.capacity or math.nan) / n, far=far)
    names = ("steps 100", "steps 1000", "steps 10000", "steps 1e+06", "steps inf")
    at_threshold = [sweeps[name].at(n) for name in names]
    falls = float(all(a > b for a, b in zip(at_threshold, at_threshold[1:], strict=False)))
    log_heights = {
        f"log_{t}": math.log10(heights[f"steps {k:g}"])
        for t, k in zip(("first", "middle", "late"), (1e2, 1e4, 1e6), strict=True)
    }
    run.values("training_time", **log_heights, falls=falls)
    table = compare({name: sweep for name, sweep in sweeps.items() if name not in APART}, n)
    correlation = float(spearmanr(table["train_loss"], table["height"]).statistic)  # pyright: ignore
    run.values("low_loss", correlation=correlation, settings=len(table))
    sizes = list(exact["capacity"])
    k = sizes.index(n)
    log_kappa = np.log10(condition)
    run.values(
        "conditioning",
        at_threshold=float(int(np.argmax(condition)) == k),
        log_left=log_kappa[k] - log_kappa[sizes.index(n // 4)],
        log_right=log_kappa[k] - log_kappa[-1],
    )
    scaled = arms["standardized features, minimum"]
    change = math.log(scaled["condition_number"][k] / condition[k])
    effect = math.log(heights["standardized features, minimum"] / heights["steps inf"])
    run.values("standardization", same=float(change * effect > 0), log_condition=change, log_height=effect)
    tops = {name: peak(arm["capacity"], arm["test_loss"]) for name, arm in networks.items()}
    middle = list(networks["adam"]["capacity"]).index(27)
    ratio = networks["sgd"]["train_loss"][middle] / networks["adam"]["train_loss"][middle]
    run.values(
        "networks", adam=tops["adam"].height, width=tops["adam"].capacity or 0, sgd=tops["sgd"].height, loss_ratio=ratio
    )
    run.values("negative_control", ridge=result(ridge).peak().height, interpolation=heights["steps inf"])


def figures(results: Results) -> plots.Figures:
    """The unified view of the first seed, and test losses of the closed forms."""
    first = results.arms[0]
    columns = ("train_loss", "test_loss", "test_error")
    arms = {name: {c: first["closed_form"][f"{name}/{c}"] for c in columns} for name in CLOSED if name not in APART}
    sweeps = {name: result({**arm, "capacity": first["closed_form"]["capacity"]}) for name, arm in arms.items()}
    others = [name for name, arm in first.items() if name != "closed_form" and not name.startswith("network")]
    table = compare(
        {**sweeps, **{name: result(first[name]) for name in others if name != "ridge"}}, results.settings.train_size
    )
    lines = {name: ("closed_form", f"{name}/test_loss") for name in CLOSED if name.startswith("steps")}
    own = {"xlabel": "features", "ylabel": "test loss", "logx": True, "logy": True}
    curves = plots.curves(
        results, {**lines, "tuned ridge": ("ridge", "test_loss")}, x=first["ridge"]["capacity"], **own
    )
    return {"unified view": plot_comparison(table), "training time": curves}
