"""What solving the convex program of a two-layer network costs: an iteration of ADMM, and whole solves beside CVXPY."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchfolio.theory.convex_relu import activation_patterns, admm


def seconds_of_an_iteration(examples: int, sizes: tuple[int, ...], seed: int, columns: int = 31) -> dict[str, Any]:
    """Median of ten iterations by numbers of patterns, with each way to take the main step."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(examples, columns, generator=generator, dtype=torch.float64) / columns**0.5
    y = torch.randn(len(X), generator=generator, dtype=torch.float64)
    seconds: dict[Literal["dense", "woodbury"], list[float]] = {"dense": [], "woodbury": []}
    for n in sizes:
        D = activation_patterns(X, n, generator=generator)
        for solver, column in seconds.items():
            stamps: list[float] = []

            def stamp(k: int, blocks: Tensor, stamps: list[float] = stamps) -> None:
                stamps.append(time.perf_counter())

            admm(X, y, D, tol=1e-12, max_iter=12, linear_solver=solver, callback=stamp)
            column.append(float(np.median(np.diff(stamps))))
    return {"patterns": list(sizes), **seconds}


def plain_cvxpy(X: Tensor, y: Tensor, D: Tensor, beta: float) -> float:
    """The program written as it stands in the paper, solved by Clarabel: the peer of the solvers here."""
    import cvxpy as cp

    data, target, active = (t.double().numpy() for t in (X, y, D))
    v, w = (cp.Variable((active.shape[1], data.shape[1])) for _ in range(2))
    prediction = cp.sum(cp.multiply(active, data @ (v - w).T), axis=1)
    cones: Any = [cp.multiply(2 * active - 1, data @ block.T) >= 0 for block in (v, w)]
    size = cp.sum(cp.norm(v, 2, axis=1)) + cp.sum(cp.norm(w, 2, axis=1))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(prediction - target) / 2 + beta * size), cones)
    problem.solve(solver="CLARABEL")
    return float(problem.value)  # pyright: ignore[reportArgumentType]
