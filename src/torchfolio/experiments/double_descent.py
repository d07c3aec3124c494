"""Measures the peak of double descent over optimisation settings: closed forms, iterated readouts, and small networks.

Longer than most, since every axis of optimisation is a fit of its own kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.insight.double_descent import (
    Decomposition,
    RandomFeatures,
    SweepResult,
    capacity_sweep,
    compare,
    gradient_descent_path,
    peak,
    plot_comparison,
    sgd_rate,
    train_nested,
)
from torchfolio.runs import Results, Run

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
    """Data, grids and budgets.

    Attributes:
        noise_rate: probability with which a training label is redrawn from all classes (a tenth of them stay).
        scale: factor of the centred inputs, so that tanh bends.
        sizes: numbers of features, as shares of the number of samples.
        iterated: those for which SGD and Adam are iterated.
        widths: hidden units of the networks.
    """

    data: str = "digits"
    train_size: int = 200
    noise_rate: float = 0.2
    scale: float = 3.0
    sizes: tuple[float, ...] = (
        *(0.1, 0.15, 0.25, 0.375, 0.5, 0.625, 0.75, 0.85, 0.925, 0.975),
        *(1.0, 1.025, 1.075, 1.15, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0),
    )
    iterated: tuple[float, ...] = (0.1, 0.25, 0.5, 0.85, 1.0, 1.15, 1.5, 2.0, 5.0, 8.0)
    epochs: int = 200
    widths: tuple[int, ...] = (4, 8, 16, 27, 40, 80, 200)
    network_steps: int = 1500


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


@dataclass(frozen=True)
class Problem:
    """Inputs and targets `[N, K]` of the three splits."""

    inputs: tuple[Tensor, Tensor, Tensor]
    targets: tuple[Tensor, Tensor, Tensor]
    labels: tuple[Tensor, Tensor, Tensor]
    seed: int

    def features(self, count: int, scale: float = 1.0, standardize: str = "") -> tuple[Tensor, ...]:
        """Random features of the splits, nested by their number."""
        inputs = _standardized(self.inputs) if standardize == "inputs" else self.inputs
        generator = torch.Generator().manual_seed(self.seed)
        random = RandomFeatures(inputs[0].shape[1], count, torch.tanh, scale, generator, torch.float64)
        features = tuple(random(x) for x in inputs)
        return _standardized(features) if standardize == "features" else features


def _standardized(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mean, std = parts[0].mean(0), parts[0].std(0)
    return tuple((part - mean) / torch.where(std > 0, std, 1.0) for part in parts)


def run(run: Run[Settings]) -> None:
    """Sweep the number of features, then the width of networks."""
    settings, problem = run.settings, load(run)
    n = settings.train_size
    arms: dict[str, dict[str, Any]] = {}
    closed = run.arm("closed_form", closed_forms, problem, sizes_of(settings.sizes, n))
    for name in CLOSED:
        arms[name] = {column: closed[f"{name}/{column}"] for column in ("train_loss", "test_loss", "test_error")}
        arms[name]["capacity"] = closed["capacity"]
    variants: dict[str, dict[str, Any]] = {
        "small inputs": {"scale": 0.2},
        "standardized inputs": {"standardize": "inputs"},
    }
    variants["standardized features"] = {"standardize": "features"}
    variants["standardized features, minimum"] = {"standardize": "features", "steps": INF}
    for name, changes in variants.items():
        arms[name] = run.arm(name, one_setting, problem, sizes_of(settings.sizes, n), **changes)
    adam = partial(torch.optim.Adam, lr=1e-2)
    iterated: dict[str, Any] = {f"batch {n // share}": {"batch_size": n // share} for share in (4, 20)}
    iterated["Adam"] = {"optimizer": adam, "batch_size": n}
    for name, how in iterated.items():
        widths = sizes_of(settings.iterated, n)
        arms[name] = run.arm(name, readouts, problem, widths, epochs=settings.epochs, **how)
    ridge = run.arm("ridge", tuned_ridge, problem, sizes_of(settings.sizes, n))
    networks = {name: run.arm(f"network {name}", network_sweep, run, problem, name) for name in ("adam", "sgd")}
    _claims(run, arms, closed["condition_number"], ridge, networks)


def sizes_of(shares: tuple[float, ...], n: int) -> list[int]:
    """Whole numbers of features."""
    return [round(share * n) for share in shares]


def load(run: Run[Settings]) -> Problem:
    """Centred inputs, and targets of which the training's are noisy."""
    settings = run.settings
    splits = run.data(settings.data, train_size=settings.train_size, val=400, normalize=False)
    parts = [part.tensors for part in (splits.train, splits.val, splits.test)]
    mean = parts[0][0].double().mean(0)
    inputs = [settings.scale * (x.double() - mean).flatten(1) for x, _ in parts]
    generator, classes = torch.Generator().manual_seed(run.seed), splits.num_classes
    labels = [y for _, y in parts]
    redrawn = torch.rand(len(labels[0]), generator=generator) < settings.noise_rate
    labels[0] = torch.where(redrawn, torch.randint(classes, labels[0].shape, generator=generator), labels[0])
    targets = [F.one_hot(y, classes).double() for y in labels]
    return Problem(tuple(inputs), tuple(targets), tuple(labels), run.seed)  # pyright: ignore[reportArgumentType]


def _columns(rows: list[tuple[float, ...]], *more: str) -> dict[str, Any]:
    """Columns of a sweep from its rows, a row for each size."""
    names = ("capacity", "train_loss", "test_loss", "test_error", *more)
    return dict(zip(names, np.array(rows, dtype=float).T, strict=True))


def _scores(problem: Problem, output: Tensor, split: int = 2) -> tuple[float, float]:
    loss = float((output - problem.targets[split]).square().mean())
    return loss, float((output.argmax(1) != problem.labels[split]).double().mean())


def closed_forms(problem: Problem, sizes: list[int]) -> dict[str, Any]:
    """Every closed-form setting, from one decomposition for each size."""
    Z, _, Z_test = problem.features(max(sizes))
    Y = problem.targets[0]
    start = torch.randn(max(sizes), Y.shape[1], generator=torch.Generator().manual_seed(problem.seed)).double()
    rows: dict[str, list[float]] = {"capacity": [float(p) for p in sizes], "condition_number": []}
    for p in sizes:
        taken_apart = Decomposition(Z[:, :p], Y)
        points, default = taken_apart.project(Z_test[:, :p]), taken_apart.limit() / 2
        rows["condition_number"].append(taken_apart.condition_number)
        for name, (steps, share, momentum, omega) in CLOSED.items():
            init = omega / math.sqrt(p) * start[:p]
            path = taken_apart.path(steps, lr=share * default, momentum=momentum, init=init)
            values = (float(path.train_loss), *_scores(problem, path.predict(points)[0]))
            for column, value in zip(("train_loss", "test_loss", "test_error"), values, strict=True):
                rows.setdefault(f"{name}/{column}", []).append(value)
    return {name: np.array(values) for name, values in rows.items()}


def one_setting(problem: Problem, sizes: list[int], steps: float = 1e4, **changes: Any) -> dict[str, Any]:
    """Plain gradient descent on other features."""
    Z, _, Z_test = problem.features(max(sizes), **changes)
    rows = []
    for p in sizes:
        path = gradient_descent_path(Z[:, :p], problem.targets[0], steps)
        sigma = path.decomposition.singular_values
        spread = float(sigma[0] / sigma[sigma > 0][-1])  # centred features of P = N always have one zero
        rows.append((p, float(path.train_loss), *_scores(problem, path.predict(Z_test[:, :p])[0]), spread))
    return _columns(rows, "condition_number")


def readouts(
    problem: Problem, sizes: list[int], *, epochs: int, batch_size: int, optimizer: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Readouts trained by iteration, all sizes at once: SGD at the stable rate of each size, or another optimizer."""
    Z, _, Z_test = problem.features(max(sizes))
    Y = problem.targets[0]
    rates = None if optimizer else [sgd_rate(Z[:, :p], batch_size) for p in sizes]
    own = {"epochs": epochs, "batch_size": batch_size, "rates": rates}
    generator = torch.Generator().manual_seed(problem.seed)
    weights = train_nested(Z, Y, sizes, optimizer or partial(torch.optim.SGD, lr=1.0), generator=generator, **own)
    scores = [
        (p, float((Z @ w - Y).square().mean()), *_scores(problem, Z_test @ w))
        for p, w in zip(sizes, weights, strict=True)
    ]
    return _columns(scores)


def tuned_ridge(problem: Problem, sizes: list[int]) -> dict[str, Any]:
    """Ridge regression, its penalty chosen for each size on held-out data."""
    Z, Z_val, Z_test = problem.features(max(sizes))
    rows = []
    for p in sizes:
        taken_apart = Decomposition(Z[:, :p], problem.targets[0])
        val, test = (taken_apart.project(z[:, :p]) for z in (Z_val, Z_test))
        paths = [taken_apart.path(l2=10.0**power) for power in np.linspace(-6, 1, 15)]
        best = min(paths, key=lambda path: _scores(problem, path.predict(val)[0], 1)[0])
        rows.append((p, float(best.train_loss), *_scores(problem, best.predict(test)[0]), best.l2))
    return _columns(rows, "l2")


def network_sweep(run: Run[Settings], problem: Problem, optimizer: str) -> dict[str, Any]:
    """Networks with one hidden layer, all of it trained by full-batch Adam or SGD."""
    make = {"adam": partial(torch.optim.Adam, lr=1e-2), "sgd": partial(torch.optim.SGD, lr=0.05)}[optimizer]

    def build(width: int, generator: torch.Generator) -> nn.Module:
        first = nn.Linear(problem.inputs[0].shape[1], width)
        last = nn.Linear(width, problem.targets[0].shape[1], bias=False)
        with torch.no_grad():
            for layer in (first, last):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            first.bias.zero_()
        return nn.Sequential(first, nn.ReLU(), last)

    def fit(model: nn.Module, train: Any) -> float:
        steps, target = make(model.parameters()), F.one_hot(train[1], problem.targets[0].shape[1]).float()
        for _ in range(run.settings.network_steps):
            steps.zero_grad()
            F.mse_loss(model(train[0]), target).backward()
            steps.step()
        with torch.no_grad():
            return float(F.mse_loss(model(train[0]), target))

    train, test = ((problem.inputs[k].float(), problem.labels[k]) for k in (0, 2))
    swept = capacity_sweep(build, run.settings.widths, fit, train, test, seed=run.seed)
    return {str(name): column.to_numpy(dtype=float) for name, column in swept.frame.items()}


def result(arm: Mapping[str, Any]) -> SweepResult:
    """An arm as a sweep."""
    return SweepResult(
        pd.DataFrame({name: arm[name] for name in ("capacity", "train_loss", "test_loss", "test_error")})
    )


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


def figures(results: Results) -> dict[str, Figure]:
    """The unified view of the first seed, and test losses of the closed forms."""
    from torchfolio.runs import plots

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


def peers(bench: Any) -> None:
    """Gradient descent in closed form against the loop, and many settings from one decomposition against one each."""
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
