"""Gradients, optima and cost of constraint solves, for the experiment on hard constraints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.dynamics.physics_moe import (
    PDE,
    Burgers1D,
    DiffusionSorption1D,
    ExpertConstraint,
    Grid,
    HardConstraint,
    LevenbergMarquardt,
)
from torchfolio.dynamics.pointwise_rows import RowProblem
from torchfolio.experiments._diffusion_sorption import Tanh, inputs, instances, network

__all__ = ["arrays", "cost", "gradient_errors", "optimum"]


def gradient_errors(settings: Any, seed: int, name: str) -> dict[str, float]:
    """Relative error of the implicit gradient, and of its Gauss-Newton variant, against central differences."""
    if name == "burgers":
        n, m = (16, 24)
        grid = Grid(periodic=("x",), t=torch.linspace(0, 0.5, n), x=torch.arange(m) / m)
        pde, initial = Burgers1D(0.02), torch.sin(2 * math.pi * grid.axes["x"])[None]
    else:
        pde, grid, train, _ = instances(settings, seed)
        initial = train[:1, 0]
    torch.manual_seed(seed)
    net = Tanh(4, 16).double()
    probe = torch.randn(grid.shape, dtype=torch.float64)

    def loss(hessian: str = "full") -> Tensor:
        solver = LevenbergMarquardt(tol=1e-12, max_steps=200)
        layer = HardConstraint(pde, solver=solver, hessian=hessian, stationary=1e-6)
        return (layer(net(inputs(grid, initial)), grid, initial).u * probe).sum()

    weights = list(net.parameters())
    full, newton = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(h), weights)]) for h in ("full", "gauss_newton")
    )
    chosen = torch.randperm(len(full))[: settings.entries]
    flat, h = nn.utils.parameters_to_vector(weights).detach(), 1e-5
    differences = torch.zeros(len(chosen), dtype=torch.float64)
    with torch.no_grad():
        for k, entry in enumerate(chosen):
            for sign in (1, -1):
                moved = flat.clone()
                moved[entry] += sign * h
                nn.utils.vector_to_parameters(moved, weights)
                differences[k] += sign * loss() / (2 * h)
    error = [float((g[chosen] - differences).norm() / differences.norm()) for g in (full, newton)]
    return {"full": error[0], "gauss_newton": error[1]}


def optimum(settings: Any, seed: int) -> dict[str, float]:
    """Every expert's objective over that of the global solution on the same rows: the largest."""
    pde, grid, _, test = instances(settings, seed)
    torch.manual_seed(seed)
    basis, initial = network(settings, settings.basis)(inputs(grid, test[:, 0]).float()).detach().double(), test[:, 0]
    solver, worst = LevenbergMarquardt(tol=1e-8, max_steps=100), 0.0
    whole = HardConstraint(pde, solver=solver)(basis, grid, initial).weights
    for experts in (settings.experts, settings.experts[::-1], (2, 2)):
        found = ExpertConstraint(pde, experts, solver=solver)(basis, grid, initial, start=whole)
        worst = max(worst, float((found.residual_after / found.residual_before).max()))
    return {"worst": worst}


def cost(settings: Any, seed: int) -> dict[str, Any]:
    """CPU seconds of the layer by points for a fixed number of steps, and the Jacobian's bytes an expert."""
    pde, grid, _, test = instances(
        replace(settings, mesh=(64, 48) if max(settings.sizes) > 200 else settings.mesh), seed
    )
    basis = torch.randn(1, *grid.shape, settings.basis, dtype=torch.float64, requires_grad=True)
    solver, initial = LevenbergMarquardt(tol=1e-300, max_steps=8), test[:1, 0]

    def once(layer: ExpertConstraint) -> float:
        start = time.thread_time()
        layer(basis, grid, initial).u.sum().backward()
        return time.thread_time() - start

    seconds = [
        min(once(HardConstraint(pde, p, solver=solver, stationary=1e9)) for _ in range(7)) for p in settings.sizes
    ]
    slope = float(np.polyfit(np.log(settings.sizes), np.log(seconds), 1)[0])
    total = max(settings.sizes)
    rows = {}
    for count in (1, 4):
        problem = ExpertConstraint(pde, (count, 1), total // count).problem(basis.detach(), grid, initial)
        jacobian = problem.linearise(torch.ones(count, settings.basis, dtype=torch.float64))[1]
        rows[count] = (jacobian.nbytes / count, problem.groups[0].terms.shape[2])
    return {"points": list(settings.sizes), "seconds": seconds, "slope": slope, "jacobian": rows[4][0] / rows[1][0],
            "equation_rows": rows[4][1] / rows[1][1]}  # fmt: skip


def arrays(pde: PDE, problem: RowProblem, n: int) -> tuple[Callable, Callable]:
    """One problem's residual and Jacobian in NumPy, its linear rows stacked beforehand."""
    groups, c = (
        [{name: t.numpy() for name, t in zip(g.names, g.terms[n], strict=True)} for g in problem.groups],
        problem.scale,
    )
    equation = {name: c[0] * t for name, t in groups[0].items()}
    values, initial = groups[0]["u"], problem.groups[1].constants["initial"][n].numpy()
    linear, wanted = (
        [problem.ridge * np.eye(values.shape[1]), c[1] * groups[1]["u"]],
        [np.zeros(values.shape[1]), c[1] * initial],
    )
    if isinstance(pde, DiffusionSorption1D):
        linear += [c[2] * groups[2]["u"], c[3] * (groups[3]["u"] - pde.diffusion * groups[3]["u_x"])]
        wanted += [np.full(len(groups[2]["u"]), c[2]), np.zeros(len(groups[3]["u"]))]
        power, speed = pde.exponent - 1, pde.time_unit * pde.diffusion

        def bent(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            inside = values @ w
            base, curved = np.maximum(inside, 0) + 1e-6, equation["u_xx"] @ w
            rate = speed / (1 + pde.retention * base**power)
            bend = (inside > 0) * rate**2 / speed * pde.retention * power * base ** (power - 1) * curved
            return equation["u_t"] @ w - rate * curved, equation["u_t"] - rate[:, None] * equation["u_xx"] + bend[
                :, None
            ] * values
    else:
        straight = equation["u_t"] - 0.02 * equation["u_xx"]

        def bent(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            u, u_x = values @ w, equation["u_x"] @ w
            return straight @ w + u * u_x, straight + u[:, None] * equation["u_x"] + u_x[:, None] * values

    rows, right = np.concatenate(linear), np.concatenate(wanted)
    return lambda w: np.concatenate([bent(w)[0], rows @ w - right]), lambda w: np.concatenate([bent(w)[1], rows])
