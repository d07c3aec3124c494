"""Small regression problems whose global optimum is known, noisy sines: solved exactly, sampled, and by Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.theory.convex_relu import (
    activation_patterns,
    admm,
    nonconvex_objective,
    sample_neurons,
    sampled_convex_program,
)


def noisy_sines(problems: int, points: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Data `[problems, points, 2]` and targets `[problems, points]`."""
    generator = torch.Generator().manual_seed(seed)
    x, disturbance = (torch.randn(problems, points, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.stack([x, torch.ones_like(x)], -1), torch.sin(3 * x) + noise * disturbance


def with_all_patterns(X: Tensor, y: Tensor, *, beta: float, steps: int, cones: bool = True) -> dict[str, Any]:
    """The convex program by ADMM, and the network recovered from it; without cones, its relaxation by gates."""
    result: dict[str, list[float]] = {"objective": [], "network_objective": [], "neurons": [], "iterations": []}
    for data, target in zip(X, y, strict=True):
        D = activation_patterns(data, "all")
        solution = admm(data, target, D, beta=beta, tol=1e-7, max_iter=steps, cones=cones, balance=True)
        network = nonconvex_objective(data, target, solution.hidden, solution.output, beta)
        result["objective"].append(solution.objective)
        result["network_objective"].append(float(network))
        result["neurons"].append(len(solution.output))
        result["iterations"].append(solution.convergence.n_iter)
    return {**{name: np.array(values) for name, values in result.items()}, "patterns": D.shape[1]}


def by_adam(X: Tensor, y: Tensor, *, beta: float, starts: int, width: int, steps: int) -> dict[str, np.ndarray]:
    """Many starts at once: Adam treats every number by itself, so runs stacked in one tensor do not meet."""
    shape = (len(X), starts, width)
    hidden = (torch.randn(*shape, X.shape[-1], dtype=X.dtype) / X.shape[-1] ** 0.5).requires_grad_()
    output = (torch.randn(shape, dtype=X.dtype) / width**0.5).requires_grad_()

    def objectives() -> Tensor:
        prediction = (output[:, :, None] @ F.relu(hidden @ X.mT[:, None]))[:, :, 0]
        decay = hidden.square().sum((2, 3)) + output.square().sum(2)
        return (prediction - y[:, None]).square().sum(2) / 2 + beta / 2 * decay

    descend([hidden, output], lambda: objectives().sum(), steps)
    return {"objectives": objectives().detach().numpy()}


def by_sampled_programs(
    X: Tensor, y: Tensor, *, beta: float, neurons: tuple[int, ...], steps: int, seed: int
) -> dict[str, np.ndarray]:
    """Programs of more and more random neurons, nested, each from the solution of the one before."""
    drawn = sample_neurons(max(neurons), X.shape[-1], torch.Generator().manual_seed(seed))
    objectives = []
    for data, target in zip(X, y, strict=True):
        start = None
        for n in neurons:
            solution = sampled_convex_program(data, target, drawn[:n], beta=beta, tol=1e-3, max_iter=steps, start=start)
            objectives.append(solution.objective)
            start = solution.state
    return {"objectives": np.array(objectives).reshape(len(X), -1)}


def descend(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    """Adam with a rate that falls from 0.02 to nothing along a cosine."""
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        schedule.step()
