"""Fits of one problem at every capacity: in closed form, by iterations, by tuned ridge, and networks of every width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.experiments._noisy_labels import Problem
from torchfolio.insight.double_descent import (
    Decomposition,
    capacity_sweep,
    gradient_descent_path,
    sgd_rate,
    train_nested,
)


def closed_forms(
    problem: Problem, sizes: list[int], settings: Mapping[str, tuple[float, float, float, float]]
) -> dict[str, Any]:
    """Every closed-form setting, from one decomposition for each size."""
    Z, _, Z_test = problem.features(max(sizes))
    Y = problem.targets[0]
    start = torch.randn(max(sizes), Y.shape[1], generator=torch.Generator().manual_seed(problem.seed)).double()
    rows: dict[str, list[float]] = {"capacity": [float(p) for p in sizes], "condition_number": []}
    for p in sizes:
        taken_apart = Decomposition(Z[:, :p], Y)
        points, default = taken_apart.project(Z_test[:, :p]), taken_apart.limit() / 2
        rows["condition_number"].append(taken_apart.condition_number)
        for name, (steps, share, momentum, omega) in settings.items():
            init = omega / math.sqrt(p) * start[:p]
            path = taken_apart.path(steps, lr=share * default, momentum=momentum, init=init)
            values = (float(path.train_loss), *problem.scores(path.predict(points)[0]))
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
        rows.append((p, float(path.train_loss), *problem.scores(path.predict(Z_test[:, :p])[0]), spread))
    return columns(rows, "condition_number")


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
        (p, float((Z @ w - Y).square().mean()), *problem.scores(Z_test @ w))
        for p, w in zip(sizes, weights, strict=True)
    ]
    return columns(scores)


def tuned_ridge(problem: Problem, sizes: list[int]) -> dict[str, Any]:
    """Ridge regression, its penalty chosen for each size on held-out data."""
    Z, Z_val, Z_test = problem.features(max(sizes))
    rows = []
    for p in sizes:
        taken_apart = Decomposition(Z[:, :p], problem.targets[0])
        val, test = (taken_apart.project(z[:, :p]) for z in (Z_val, Z_test))
        paths = [taken_apart.path(l2=10.0**power) for power in np.linspace(-6, 1, 15)]
        best = min(paths, key=lambda path: problem.scores(path.predict(val)[0], 1)[0])
        rows.append((p, float(best.train_loss), *problem.scores(best.predict(test)[0]), best.l2))
    return columns(rows, "l2")


def networks(
    problem: Problem, widths: tuple[int, ...], steps: int, make: Callable[..., torch.optim.Optimizer]
) -> dict[str, Any]:
    """Networks with one hidden layer, all of it trained on all examples at every step."""

    def build(width: int, generator: torch.Generator) -> nn.Module:
        first = nn.Linear(problem.inputs[0].shape[1], width)
        last = nn.Linear(width, problem.targets[0].shape[1], bias=False)
        with torch.no_grad():
            for layer in (first, last):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
            first.bias.zero_()
        return nn.Sequential(first, nn.ReLU(), last)

    def fit(model: nn.Module, train: Any) -> float:
        optimizer, target = make(model.parameters()), F.one_hot(train[1], problem.targets[0].shape[1]).float()
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(train[0]), target).backward()
            optimizer.step()
        with torch.no_grad():
            return float(F.mse_loss(model(train[0]), target))

    train, test = ((problem.inputs[k].float(), problem.labels[k]) for k in (0, 2))
    swept = capacity_sweep(build, widths, fit, train, test, seed=problem.seed)
    return {str(name): column.to_numpy(dtype=float) for name, column in swept.frame.items()}


def columns(rows: list[tuple[float, ...]], *more: str) -> dict[str, Any]:
    """Columns of a sweep from its rows, a row for each size."""
    names = ("capacity", "train_loss", "test_loss", "test_error", *more)
    return dict(zip(names, np.array(rows, dtype=float).T, strict=True))
