"""Tables of two classes for the convex program, and ADMM on one of them, followed iteration by iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.measure import timed
from torchfolio.runs import Run
from torchfolio.theory.convex_relu import activation_patterns, admm

Pair = tuple[Tensor, Tensor]


def two_classes(run: Run[Any], task: str, train_size: int) -> list[Pair]:
    """Training, validation and test data: 30 standardised features over √30, a bias, and labels -1 and +1.

    Of an image set, `"mnist:2,8"`, two classes in 30 principal components.
    """
    name, _, pair = task.partition(":")
    data = run.data(name) if pair else run.data(name, train_size=train_size)
    rows = [part.tensors for part in (data.train, data.val, data.test)]
    if not pair:
        return [(with_bias(x.double() / 30**0.5), y.double() * 2 - 1) for x, y in rows]
    first, second = map(int, pair.split(","))
    kept = [(y == first) | (y == second) for _, y in rows]
    images = [x[k].flatten(1).double() for (x, _), k in zip(rows, kept, strict=True)]
    labels = [torch.where(y[k] == first, 1.0, -1.0).double() for (_, y), k in zip(rows, kept, strict=True)]
    project = _principal(images[0], 30)
    parts = [(with_bias(project(x)), y) for x, y in zip(images, labels, strict=True)]
    return [(parts[0][0][:train_size], parts[0][1][:train_size]), *parts[1:]]


def with_bias(x: Tensor) -> Tensor:
    """A column of ones at the end."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def signs_agree(output: Tensor, y: Tensor) -> float:
    """Accuracy of an output whose sign is the class, for labels -1 and +1."""
    return float(((output > 0) == (y > 0)).double().mean())


def followed(parts: list[Pair], *, patterns: int, beta: float, steps: int, seed: int) -> dict[str, Any]:
    """ADMM's residual and accuracies by iteration."""
    X, y = parts[0]
    D = activation_patterns(X, patterns, generator=torch.Generator().manual_seed(seed))
    accuracies: list[list[float]] = []

    def watch(k: int, blocks: Tensor) -> None:
        # A block's ReLU response is its neuron's times its output weight, whatever the scaling between them.
        accuracies.append(
            [signs_agree(F.relu(X @ blocks[0].T).sum(1) - F.relu(X @ blocks[1].T).sum(1), y) for X, y in parts]
        )

    solution, seconds = timed(admm, X, y, D, beta=beta, tol=1e-12, max_iter=steps, callback=watch)
    history = solution.convergence.to_frame()
    names = ("train_accuracy", "val_accuracy", "test_accuracy")
    return {
        "residual": (history["primal"] + history["dual"]).to_numpy(),
        **{name: list(column) for name, column in zip(names, zip(*accuracies, strict=True), strict=True)},
        "seconds": seconds,
        "neurons": len(solution.output),
    }


def _principal(x: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """The map to the first `n` principal components of `x`, scaled together to a mean squared norm of 1."""
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean, full_matrices=False)[2][:n].T
    scale = ((x - mean) @ directions).square().sum(1).mean().sqrt()
    return lambda other: (other - mean) @ directions / scale
