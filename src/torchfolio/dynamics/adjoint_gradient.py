"""The continuous adjoint of a solve: an equation for the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.gradient_base import Recomputed
from torchfolio.dynamics.runge_kutta import ExplicitRungeKutta
from torchfolio.dynamics.solver import Solver
from torchfolio.dynamics.stepping import Adaptive, Problem, read_off, rms

__all__ = ["Adjoint"]


class Adjoint(Recomputed):
    """The continuous adjoint: an equation for the gradient, solved backwards in time together with the state.

        da/dt = -aᵀ ∂f/∂y,    dG/dt = -aᵀ ∂f/∂θ

    Memory does not grow with the steps, but the gradient is that of the exact solution, not of the computed one: it is
    as wrong as both solves' tolerances allow.

    Args:
        solver: solver of the adjoint equation; the same as forwards if None. For stochastic equations `Heun()`,
            `Midpoint()` or `Ralston()`.
        rtol: relative tolerance of the adjoint equation; as forwards if None.
        atol: absolute tolerance of the adjoint equation; as forwards if None.
        seminorm: whether the gradients G of the parameters, on which nothing depends, are left out of the error norm;
            fewer steps are rejected then.

    Reference:
        Chen et al., arXiv 1806.07366; Kidger, Chen, Lyons, arXiv 2009.09457 (the seminorm).
    """

    keeps_outputs = True

    def __init__(
        self,
        solver: Solver | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        seminorm: bool = True,
    ) -> None:
        self.solver, self.rtol, self.atol, self.seminorm = solver, rtol, atol, seminorm

    def check(self, problem: Problem, y0: Tensor) -> None:
        solver = self.solver or problem.solver
        if problem.terms.noisy and not (isinstance(solver, ExplicitRungeKutta) and solver.calculus == "stratonovich"):
            raise ValueError(
                f"expected Heun() or Midpoint() to solve the adjoint of a stochastic equation, got {solver}"
            )
        if solver.implicit:
            raise ValueError(f"expected an explicit solver of the adjoint equation, got {solver}; or use Checkpoint()")
        super().check(problem, y0)

    def forward(self, problem: Problem, y0: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
        return read_off(problem, y0), [], None

    def backward(
        self, problem: Problem, ys: Tensor, kept: Sequence[Tensor], rest: Any, a: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        terms, n = problem.terms.adjoint(), ys[0].numel()
        steps = problem.adaptive

        def seminorm(x: Tensor) -> Tensor:
            # Measured apart, the state and its gradient are each held to the tolerance, however many parameters.
            return torch.maximum(rms(x[:n]), rms(x[n : 2 * n]))

        def norm(x: Tensor) -> Tensor:
            return torch.maximum(seminorm(x), rms(x[2 * n :])) if x.numel() > 2 * n else seminorm(x)

        adaptive = Adaptive(
            steps.rtol if self.rtol is None else self.rtol,
            steps.atol if self.atol is None else self.atol,
            steps.pi,
            seminorm if self.seminorm else norm,
        )
        back = replace(problem, terms=terms, solver=self.solver or problem.solver, adaptive=adaptive, last_step=None)
        state = torch.cat([ys[-1].reshape(-1), a[-1].reshape(-1), ys.new_zeros(terms.n_params)])
        for k in range(len(problem.ts) - 1, 0, -1):
            t1, t0 = problem.ts[k], problem.ts[k - 1]
            inner = None if problem.grid is None else _between(problem.grid, t0, t1)
            grid = None if inner is None else [t1, *reversed(inner), t0]
            jumps = dict.fromkeys(reversed(_between(problem.jumps, t0, t1, ends=True)))
            back = replace(back, ts=(t1, t0), grid=grid, jumps=jumps, last_step=back.last_step)
            with torch.no_grad():
                state = read_off(back, state)[-1]
            # The state is known at every output, and outputs add to the gradient.
            y = ys[k - 1].reshape(-1)
            state = torch.cat([y, state[n : 2 * n] + a[k - 1].reshape(-1), state[2 * n :]])
        parts = state[2 * n :].split([p.numel() for p in problem.terms.params])
        grads = [part.view_as(p).to(p.dtype) for part, p in zip(parts, problem.terms.params, strict=True)]
        return state[n : 2 * n].view_as(ys[0]), grads

    def __repr__(self) -> str:
        options = {"solver": self.solver, "rtol": self.rtol, "atol": self.atol}
        text = [f"{name}={value}" for name, value in options.items() if value is not None]
        return f"Adjoint({', '.join(text + ([] if self.seminorm else ['seminorm=False']))})"


def _between(times: Iterable[float], t0: float, t1: float, ends: bool = False) -> list[float]:
    low, high = min(t0, t1), max(t0, t1)
    return [t for t in times if low < t < high or (ends and t in (low, high))]
