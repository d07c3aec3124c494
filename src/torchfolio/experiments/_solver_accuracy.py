"""Accuracy of solvers, of gradients and of Brownian motion, for the experiment on neural differential equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from torchfolio.dynamics import neural_de as de
from torchfolio.dynamics.vector_fields import VectorField
from torchfolio.measure import saved_bytes

__all__ = ["brownian", "gradients", "orders"]

SOLVERS = (
    de.Euler, de.Midpoint, de.Heun, de.Ralston, de.Bosh3, de.RK4, de.Dopri5, de.Tsit5, de.ReversibleHeun,
    de.ImplicitEuler, de.Kvaerno3,
)  # fmt: skip


def orders() -> dict[str, float]:
    """Slopes of the error of all solvers on a linear equation, and the error of adaptive steps."""
    ts = torch.linspace(0, 5, 17, dtype=torch.float64)
    exact = 1.5 * (-ts).exp() + (ts.sin() - ts.cos()) / 2
    field, one = (lambda t, y: -y + torch.sin(t)), torch.ones(1, dtype=torch.float64)

    def error(solver: de.ReversibleHeun | Any, **options: Any) -> float:
        return float((de.odeint(field, one, ts, solver, **options).ys[:, 0] - exact).abs().max())

    slopes = {s.__name__: math.log2(error(s(), dt=5 / 80) / error(s(), dt=5 / 160)) for s in SOLVERS}
    ys = de.odeint(field, one, ts, de.Dopri5(), rtol=1e-6, atol=1e-8).ys[:, 0].numpy()
    reference = solve_ivp(lambda t, y: -y + np.sin(t), (0, 5), [1.0], "DOP853", ts.numpy(), rtol=1e-12, atol=1e-12).y[0]
    worst = max(abs(slopes[s.__name__] - s.order) for s in SOLVERS)
    adaptive = float(np.abs(ys - exact.numpy()).max())
    return {
        "worst_slope": worst,
        "adaptive_error": adaptive,
        "reference_gap": float(np.abs(ys - reference).max()),
        **slopes,
    }


class _Tanh(nn.Module):
    """Three tanh layers and a bounded forcing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = ((3, 32), (32, 32), (32, 3))
        self.net = nn.Sequential(*(m for n, k in sizes for m in (nn.Linear(n, k), nn.Tanh()))).to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 4 * self.net(y) + torch.cos(2 * t)


def gradients(steps: int, seed: int) -> dict[str, float]:
    """Errors of exact and adjoint gradients over a number of steps, and growth of what is saved for them."""
    values: dict[str, list[float]] = {"single": [], "double": [], "adjoint": []}
    dt = 0.125
    horizon = steps * dt
    for dtype, name in ((torch.float32, "single"), (torch.float64, "double")):
        field = _Tanh(dtype)
        y0 = torch.randn(8, 3, dtype=dtype)
        noise = {
            "additive": lambda t, y: torch.full_like(y, 0.3),
            "diagonal": VectorField(3, 16, 1, activation=nn.Tanh()).to(dtype),
        }
        solves: list[Callable[[Tensor, Any, Any], Tensor]] = [
            lambda y, solver, mode, f=field: de.odeint(f, y, [0, 0.3 * horizon, horizon], solver, mode, dt=dt).ys
        ]
        for kind, diffusion in noise.items():
            sde = de.SDE(field, diffusion, kind)
            params = list(field.parameters())
            solves.append(
                lambda y, solver, mode, sde=sde, p=params: (
                    de.sdeint(sde, y, [0, 0.3 * horizon, horizon], solver, mode, dt=dt, seed=seed, params=p).ys
                )
            )
        for k, solve in enumerate(solves):
            exact, reverse = (
                _gradient(solve, y0, field, de.ReversibleHeun(), m) for m in (de.Direct(), de.Reversible())
            )
            values[name].append(_gap(reverse, exact))
            solver = de.Heun() if k else de.ReversibleHeun()  # stochastic adjoints are solved by Heun's method
            exact, adjoint = (_gradient(solve, y0, field, solver, mode) for mode in (de.Direct(), de.Adjoint()))
            values["adjoint"].append(_gap(adjoint, exact))
    field, y0 = _Tanh(torch.float32), torch.randn(8, 3)

    def held(gradient: Any, count: int) -> int:
        def forward() -> Tensor:
            return de.odeint(field, y0.clone().requires_grad_(), [0, 5], de.ReversibleHeun(), gradient, dt=5 / count).ys

        kept: list[Tensor] = []
        return saved_bytes(lambda: kept.append(forward()), exclude=field).peak

    ratios = {
        name: held(g, 400) / held(g, 50) for name, g in (("growth", de.Reversible()), ("growth_direct", de.Direct()))
    }
    return {
        "single": max(values["single"]),
        "double": max(values["double"]),
        "adjoint": min(values["adjoint"]),
        **ratios,
    }


def _gradient(solve: Callable[..., Tensor], y0: Tensor, field: nn.Module, solver: Any, mode: Any) -> Tensor:
    y = y0.clone().requires_grad_()
    grads = torch.autograd.grad(solve(y, solver, mode).square().sum(), [y, *field.parameters()])
    return torch.cat([grad.flatten() for grad in grads])


def _gap(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def brownian(seeds: int, paths: int, seed: int) -> dict[str, float]:
    """Consistency of a Brownian interval, its law over a number of seeds, and that of solutions over a number of paths."""
    w, rng = de.BrownianInterval(0.0, 1.0, (8,), seed), np.random.default_rng(seed)
    queries = [tuple(sorted(rng.random(3))) for _ in range(300)]
    first = [w(s, t) for s, _, t in queries]
    additivity = max(float((w(s, m) + w(m, t) - v).abs().max()) for (s, m, t), v in zip(queries, first, strict=True))
    order = rng.permutation(len(queries))
    repeat = max(float((w(queries[i][0], queries[i][2]) - first[i]).abs().max()) for i in order)
    base = seed * seeds
    draws = torch.stack([de.BrownianInterval(0.0, 1.0, (), base + k)(0.3, 0.9) for k in range(seeds)])
    theta, sigma = 1.0, 0.7
    ou = de.SDE(lambda t, y: -theta * y, lambda t, y: torch.full_like(y, sigma), "additive", "ito")
    ys = de.sdeint(ou, torch.zeros(paths, 1), torch.arange(0.0, 21.0), de.Euler(), dt=0.01, seed=seed).ys[6:]
    n = min(400, paths)
    w = de.BrownianInterval(0.0, 1.0, (n, 1), seed, dtype=torch.float64)
    gbm = de.SDE(lambda t, y: torch.zeros_like(y), lambda t, y: y)
    errors = []
    for steps in (16, 64, 256):
        end = de.sdeint(gbm, torch.ones(n, 1).double(), [0, 1], dt=1 / steps, brownian=w).ys[-1]
        errors.append(float((end - w(0, 1).exp()).abs().mean()))
    return {
        "additivity": additivity,
        "repeat": repeat,
        "mean_sigmas": abs(float(draws.mean())) / math.sqrt(0.6 / seeds),
        "variance_error": abs(float(draws.var()) / 0.6 - 1),
        "ou_error": abs(float(ys.var()) / (sigma**2 / (2 * theta)) - 1),
        "strong_slope": math.log(errors[0] / errors[2]) / math.log(16),
    }
