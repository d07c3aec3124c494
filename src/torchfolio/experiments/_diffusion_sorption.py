"""Diffusion-sorption with its reference solutions, and networks for it, for the experiment on hard constraints."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.dynamics.physics_moe import FNO, DiffusionSorption1D, Grid

__all__ = ["Tanh", "inputs", "instances", "network"]

UNIT = 450.0  # the window's length: its time runs from 0 to 1


class Tanh(nn.Module):
    """Basis functions by a perceptron on (t, x, start at x, mean start), spread widely enough to be of use untrained."""

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(3):
            layers += [nn.Linear(4 if k == 0 else width, width), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(width, outputs))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight, 1.5)
                nn.init.normal_(layer.bias, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def inputs(grid: Grid, initial: Tensor) -> Tensor:
    """Coordinates, the start at x and its mean, at every point: `[B, T, X, 4]`."""
    points = grid.points().to(initial).expand(len(initial), *grid.shape, 2)
    start = initial[:, None].expand(-1, *grid.shape)
    return torch.cat([points, start[..., None], initial.mean(1).view(-1, 1, 1, 1).expand(*start.shape, 1)], -1)


def reference(settings: Any, starts: np.ndarray, pde: DiffusionSorption1D, finer: int = 4) -> tuple[Grid, Tensor]:
    """Solutions by the method of lines on a finer grid: the mesh of the window, `[N, T, X]`."""
    from scipy.integrate import solve_ivp

    nt, nx = settings.mesh
    n = finer * (nx - 1) + 1
    h, times = 1 / (n - 1), np.linspace(50, 50 + UNIT, nt)
    d = pde.diffusion

    def slope(_t: float, inside: np.ndarray) -> np.ndarray:
        # u = 1 at the left end, u = D u_x by one-sided differences of second order at the right one
        end = d * (-4 * inside[-1] + inside[-2]) / (2 * h - 3 * d)
        u = np.concatenate([[1.0], inside, [end]])
        speed = d / pde.retardation(torch.from_numpy(inside)).numpy()
        return speed * (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2

    found = []
    for start in starts:
        inside = solve_ivp(slope, (0, times[-1]), np.full(n - 2, start), "LSODA", times, rtol=1e-7, atol=1e-9,
                           lband=1, uband=1).y.T  # fmt: skip
        end = d * (-4 * inside[:, -1:] + inside[:, -2:-1]) / (2 * h - 3 * d)
        found.append(np.concatenate([np.ones_like(end), inside, end], 1)[:, ::finer])
    grid = Grid(t=torch.linspace(0, 1, nt, dtype=torch.float64), x=torch.linspace(0, 1, nx, dtype=torch.float64))
    return grid, torch.from_numpy(np.stack(found))


def instances(settings: Any, seed: int) -> tuple[DiffusionSorption1D, Grid, Tensor, Tensor]:
    """The equation in the window's time, its grid, training and test solutions."""
    starts = np.random.default_rng(seed).uniform(0.01, 0.19, settings.train_size + settings.test_size)
    grid, u = reference(settings, starts, DiffusionSorption1D())
    return DiffusionSorption1D(time_unit=UNIT), grid, u[: settings.train_size], u[settings.train_size :]


def network(settings: Any, outputs: int) -> nn.Module:
    if settings.fno:
        return FNO(4, outputs, (8, 8), settings.width, 5)
    return Tanh(outputs, settings.width)
