"""Levenberg-Marquardt for many small least-squares problems at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.shown import Shown

__all__ = ["LeastSquares", "LevenbergMarquardt", "Problem"]

Linearised = tuple[Tensor, Tensor]


@dataclass(frozen=True, repr=False)
class LeastSquares(Shown):
    """What the solver found.

    Attributes:
        w: solution of every problem, `[N, K]`.
        cost: $\\frac12 \\|F(w)\\|^2$ there, `[N]`.
        start_cost: cost at the start.
        gradient: $\\|J^\\top F\\|_\\infty$ over $\\max(1, \\|J\\|_F \\|F\\|_\\infty)$ there, `[N]`.
        steps: number of steps that each problem took, `[N]`.
        converged: whether it met the tolerance, `[N]`.
    """

    w: Tensor
    cost: Tensor
    start_cost: Tensor
    gradient: Tensor
    steps: Tensor
    converged: Tensor


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Minimises $\\frac12 \\|F(w)\\|^2$ for N problems side by side, each with a damping of its own.

    A step solves $(J^\\top J + \\lambda\\, \\mathrm{diag}(J^\\top J) + \\epsilon I)\\, \\delta = J^\\top F$ with
    $\\epsilon = 10^{-12}\\, \\mathrm{tr}(J^\\top J) / K$. Where the cost falls at $w - \\delta$ it is taken and $\\lambda$ shrinks;
    elsewhere $\\lambda$ grows. Solved problems are masked, and left out once half of them are.

    Args:
        tol: relative size of the gradient, or of a step, at which a problem is solved; it is also once a step promises to
            lower the cost by less than `tol ** 1.5` of it.
        max_steps: maximum number of steps.
        damping: first $\\lambda$.
        down: factor of $\\lambda$ after a step that was taken, in (0, 1).
        up: factor after one that was not, above 1.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> target = torch.tensor([[4.0], [9.0]], dtype=torch.float64)
        >>> solver = LevenbergMarquardt(tol=1e-10)
        >>> solver(lambda w: w**2 - target, torch.ones_like(target)).w.round(decimals=6).flatten().tolist()
        [2.0, 3.0]
    """

    tol: float = 1e-4
    max_steps: int = 100
    damping: float = 1e-3
    down: float = 0.1
    up: float = 10.0

    def __post_init__(self) -> None:
        checks.positive("tol", self.tol)
        checks.whole("max_steps", self.max_steps, 1)
        checks.positive("damping", self.damping)
        checks.between("down", self.down, 0, 1, inclusive=False)
        checks.between("up", self.up, 1, float("inf"), inclusive=False)

    def __call__(self, problem: Problem | Callable[[Tensor], Tensor], w0: Tensor) -> LeastSquares:
        """Solve from `w0`.

        Args:
            problem: F, a function from w `[N, K]` to `[N, P]` whose rows do not depend on each other (its Jacobian is
                made by K forward-mode products), or a `Problem` that brings its Jacobian.
            w0: starts `[N, K]`.

        Raises:
            ValueError: if shapes do not fit, or F is not finite at the start.
        """
        if w0.dim() != 2 or not w0.numel():
            raise ValueError(f"expected starts [N, K], got shape {tuple(w0.shape)}")
        with torch.no_grad():
            return self._solve(problem if isinstance(problem, Problem) else _Function(problem), w0.detach())

    def _solve(self, problem: Any, w0: Tensor) -> LeastSquares:
        state = _State.at(w0, problem)
        checks.finite("residual at the start", state.cost)
        damping, done = torch.full_like(state.cost, self.damping), state.slope <= self.tol
        steps, start = torch.zeros_like(done, dtype=torch.int64), state.cost
        whole, rows = state.clone(), torch.arange(len(w0), device=w0.device)  # what is under way, and where it belongs
        for _ in range(self.max_steps):
            left = int((~done).sum())
            if not left:
                break
            if 2 * left <= len(done) and hasattr(problem, "take"):
                whole.put(rows, state)
                open_ = (~done).nonzero()[:, 0]
                problem, state, rows = problem.take(open_), state.take(open_), rows[open_]
                damping, done = damping[open_], done[open_]
            step, solvable = _damped(state.normal, state.gradient, damping)
            trial = _State.at(state.w - step, problem)
            # Near the optimum the cost is level to the last digit, and the gradient says which point is better.
            level = (trial.cost <= state.cost * (1 + LEVEL)) & (trial.slope < state.slope)
            accepted = solvable & ((trial.cost < state.cost * (1 - LEVEL)) | level) & ~done
            # What the step promises is nothing beside the cost: beside a kink it may stay so for ever.
            flat = solvable & ((step * state.gradient).sum(1) <= self.tol**1.5 * state.cost)
            short = solvable & (step.norm(dim=1) <= self.tol * (state.w.norm(dim=1) + self.tol))
            damping = damping * torch.where(accepted, self.down, self.up)
            steps[rows] += ~done
            state = state.replaced(trial, accepted)
            done = done | short | flat | (state.slope <= self.tol)
        whole.put(rows, state)
        finished = torch.ones_like(whole.slope, dtype=torch.bool)
        finished[rows] = done
        return LeastSquares(whole.w, whole.cost, start, whole.slope, steps, finished)


LEVEL = 1e-14  # relative difference of costs that is rounding


@runtime_checkable
class Problem(Protocol):
    """N least-squares problems that know their Jacobian."""

    def linearise(self, w: Tensor) -> Linearised:
        """F `[N, P]` and its Jacobian `[N, P, K]` at w `[N, K]`."""
        ...

    def take(self, index: Tensor) -> Problem:
        """Those of some of the N problems: the solver goes on with what is not solved yet."""
        ...


class _Function:
    """A function with its Jacobian by one Jacobian-vector product for each of the K unknowns.

    They are derivatives of v ↦ Jᵀ v, which is linear: torch's forward mode takes seconds to load.
    """

    def __init__(self, residual: Callable[[Tensor], Tensor]) -> None:
        self.residual = residual

    def linearise(self, w: Tensor) -> Linearised:
        units = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)[:, None].expand(-1, *w.shape)
        with torch.enable_grad():
            point = w.detach().requires_grad_()
            residual = self.residual(point)
            v = torch.zeros_like(residual, requires_grad=True)
            (pulled,) = torch.autograd.grad(residual, point, v, create_graph=True, materialize_grads=True)
            if not pulled.requires_grad:  # the residual does not depend on w
                return residual.detach(), residual.new_zeros(*residual.shape, w.shape[1])
            (columns,) = torch.autograd.grad(pulled, v, units, is_grads_batched=True)
        return residual.detach(), columns.permute(1, 2, 0)


@dataclass
class _State:
    """N points with cost, $J^\\top J$, gradient, and the gradient's relative size."""

    w: Tensor
    cost: Tensor
    normal: Tensor
    gradient: Tensor
    slope: Tensor

    @staticmethod
    def at(w: Tensor, problem: Any) -> _State:
        residual, jacobian = problem.linearise(w)
        if residual.dim() != 2 or jacobian.shape != (len(w), residual.shape[1], w.shape[1]):
            raise ValueError(f"expected residuals [{len(w)}, P] and their Jacobian, got shape {list(residual.shape)}")
        gradient = (jacobian.mT @ residual[:, :, None])[:, :, 0]
        normal = jacobian.mT @ jacobian
        # The largest row of J is at most its Frobenius norm; no pass over J is needed for the scale.
        size = normal.diagonal(dim1=1, dim2=2).sum(1).sqrt() * residual.abs().amax(1)
        slope = gradient.abs().amax(1) / size.clamp_min(1)
        return _State(w, 0.5 * residual.square().sum(1), normal, gradient, slope)

    def _each(self) -> list[str]:
        return [field.name for field in fields(self)]

    def clone(self) -> _State:
        return _State(*(getattr(self, name).clone() for name in self._each()))

    def take(self, index: Tensor) -> _State:
        return _State(*(getattr(self, name)[index] for name in self._each()))

    def put(self, index: Tensor, part: _State) -> None:
        for name in self._each():
            getattr(self, name)[index] = getattr(part, name)

    def replaced(self, other: _State, where: Tensor) -> _State:
        pairs = ((getattr(other, name), getattr(self, name)) for name in self._each())
        return _State(*(torch.where(where.view(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in pairs))


def _damped(normal: Tensor, gradient: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The step, and whether its system could be solved."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    shift = damping[:, None] * diagonal + 1e-12 * diagonal.mean(1, keepdim=True)
    factor, info = torch.linalg.cholesky_ex(normal + torch.diag_embed(shift))
    solvable = info == 0
    factor = torch.where(
        solvable[:, None, None], factor, torch.eye(len(factor[0]), dtype=factor.dtype, device=factor.device)
    )
    return torch.cholesky_solve(gradient[:, :, None], factor)[:, :, 0], solvable
