"""Solves of 4 experts for 32 instances as in training, against SciPy's MINPACK with exact Jacobians, one by one."""

from __future__ import annotations

import math

import numpy as np
import torch

from torchfolio.dynamics.physics_moe import Burgers1D, ExpertConstraint, Grid, LevenbergMarquardt
from torchfolio.experiments._constraint_solves import arrays
from torchfolio.experiments._diffusion_sorption import Tanh, inputs, instances
from torchfolio.experiments.physics_moe import Settings
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    from scipy.optimize import least_squares

    torch.manual_seed(0)
    settings = Settings(train_size=32, test_size=1)
    pde, grid, train, _ = instances(settings, 0)
    periodic = Grid(periodic=("x",), t=torch.linspace(0, 0.5, 32), x=torch.arange(48) / 48)
    waves = torch.randn(32, 1, dtype=torch.float64).exp() * torch.sin(2 * math.pi * periodic.axes["x"])
    solver, start = LevenbergMarquardt(max_steps=settings.max_iterations), torch.ones(128, 8, dtype=torch.float64)
    limits = {"method": "lm", "xtol": 1e-4, "ftol": 1e-4, "gtol": 1e-4, "max_nfev": settings.max_iterations}
    for equation, mesh, initial in ((pde, grid, train[:, 0]), (Burgers1D(0.02), periodic, waves)):
        basis = Tanh(8, 64)(inputs(mesh, initial).float()).detach().double()
        for points in (32, 384):
            problem = ExpertConstraint(equation, (4, 1), points).problem(basis, mesh, initial)
            single = [arrays(equation, problem, n) for n in range(128)]
            bench.compare(
                f"{type(equation).__name__}, 128 solves with {points} points, K = 8",
                ours=lambda problem=problem: solver(problem.compressed(), start),
                scipy=lambda single=single: [least_squares(f, np.ones(8), jac, **limits) for f, jac in single],
            )
