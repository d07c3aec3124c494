"""Diagonally implicit Runge–Kutta methods, for stiff equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchfolio.checks import whole
from torchfolio.dynamics.quadratic_program import attach_gradient
from torchfolio.dynamics.runge_kutta import combine
from torchfolio.dynamics.solver import Carry, Solver, Step, hermite
from torchfolio.dynamics.terms import Terms

__all__ = ["DiagonallyImplicit", "ImplicitEuler", "Kvaerno3"]


class DiagonallyImplicit(Solver):
    """Runge–Kutta method with the same γ on the diagonal of its tableau.

        z_i = y + h Σ_(j<i) a_ij k_j + h γ f(t + c_i h, z_i),    k_i = f(t + c_i h, z_i)

    The last stage is the new state. Each stage is found by Newton's method with one Jacobian of f a step, or a new one at
    every point where that does not converge. If it does not even then, the state is NaN: an adaptive solve takes a
    shorter step, one of fixed steps stops with an error. Gradients through a stage come from the implicit function theorem, so
    they do not depend on how it was found; they can be differentiated once.

    Args:
        coupled: whether entries along all axes of the state depend on each other. By default only those along the last
            axis do, as for a field on a batch, and there is one small Jacobian for each example; a field that mixes
            examples is then not solved, and says so.
        newton_steps: maximum number of Newton steps with one Jacobian, at least 1; twice as many with new ones.

    Raises:
        ValueError: if an option is out of range.
    """

    implicit = True
    a: ClassVar[tuple[tuple[float, ...], ...]]  # rows of the implicit stages, without the diagonal
    gamma: ClassVar[float]
    b_error: ClassVar[tuple[float, ...]]  # weights of the solution minus those of the embedded one

    def __init__(self, *, coupled: bool = False, newton_steps: int = 8) -> None:
        self.coupled, self.newton_steps = coupled, whole("newton_steps", newton_steps, 1)

    def step(self, terms: Terms, t0: float, t1: float, y: Tensor, carry: Carry, noise: Any = None) -> Step:
        h = t1 - t0
        k = [carry[0] if carry else terms(t0, y)]
        newton, z = _Newton(terms, h * self.gamma, self.coupled, self.newton_steps), y
        for row in self.a:
            c = sum(row) + self.gamma
            base = combine(y, k, row, h)
            z = newton.solve(t1 if abs(c - 1) < 1e-12 else t0 + c * h, base, z)
            # Not f(t, z), in which an error of z would count as many times as the equation is stiff.
            k.append((z - base) / (h * self.gamma))
        with torch.no_grad():
            error = combine(None, k, self.b_error, h)
        return Step(t0, t1, y, z, (k[-1],), error, (k[0],))

    def interpolate(self, terms: Terms, step: Step, ts: Sequence[float]) -> Tensor:
        return hermite(step, ts, step.dense[0], step.carry[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'coupled=True' if self.coupled else ''})"


class ImplicitEuler(DiagonallyImplicit):
    """Implicit Euler method, order 1, damping every stiff part; its error is estimated by the trapezoidal rule."""

    order, error_order = 1, 2
    gamma = 1.0
    a = ((),)
    b_error = (-0.5, 0.5)


_G = 0.43586652150845967  # root of x³ - 3x² + 3x/2 - 1/6, with which the method is stable at infinity


class Kvaerno3(DiagonallyImplicit):
    """Kværnø's pair of orders 3 and 2, both stable at infinity; the usual first choice for stiff equations.

    Reference:
        Kværnø, Singly diagonally implicit Runge–Kutta methods with an explicit first stage, BIT 44, 2004.
    """

    order, error_order = 3, 3
    gamma = _G
    a = (
        (_G,),
        ((-4 * _G**2 + 6 * _G - 1) / (4 * _G), (1 - 2 * _G) / (4 * _G)),
        (
            (6 * _G - 1) / (12 * _G),
            -1 / ((24 * _G - 12) * _G),
            (-6 * _G**2 + 6 * _G - 1) / (6 * _G - 3),
        ),
    )
    b_error = (a[2][0] - a[1][0], a[2][1] - a[1][1], a[2][2] - _G, _G)


class _Newton:
    """Solves z = base + s f(t, z) for the stages of one step.

    Args:
        terms: right-hand side f.
        s: step times γ.
        coupled: whether all entries depend on each other.
        max_steps: maximum number of steps with one Jacobian.
    """

    def __init__(self, terms: Terms, s: float, coupled: bool, max_steps: int) -> None:
        self.terms, self.s, self.max_steps = terms, s, max_steps
        self.coupled = coupled or not terms.packing.single
        self.factor: tuple[Tensor, Tensor] | None = None

    def solve(self, t: float, base: Tensor, guess: Tensor) -> Tensor:
        with torch.no_grad():
            z = self._iterate(t, base.detach(), guess.detach())
        if not torch.is_grad_enabled():
            return z
        value = self.terms(t, z)
        if not (base.requires_grad or value.requires_grad):
            return z
        condition, matrix = self._rows(z - base - self.s * value), self._matrix(t, z)[0]
        return attach_gradient(self._rows(z), condition, matrix).view_as(z)

    def _iterate(self, t: float, base: Tensor, guess: Tensor) -> Tensor:
        """By one factorisation for all stages; where that does not converge, with a Jacobian at every point."""
        tol = torch.finfo(base.dtype).eps ** 0.75
        for renew in (False, True):
            z = guess
            for k in range(self.max_steps * (1 + renew)):
                if self.factor is None or (renew and k):
                    matrix, value = self._matrix(t, z)
                    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
                    self.factor = lu, pivots
                else:
                    value = self.terms(t, z)
                residual = self._rows(z - base - self.s * value).unsqueeze(-1)
                move = torch.linalg.lu_solve(*self.factor, residual).squeeze(-1)
                z = z - move.view_as(z)
                size = self._rows(z).abs().amax(-1, keepdim=True)
                if not bool(size.isfinite().all()):
                    break
                if bool((move.abs() <= tol * size).all()):
                    return z
            self.factor = None
        return torch.full_like(base, torch.nan)

    def _rows(self, z: Tensor) -> Tensor:
        """Vectors that depend on themselves alone `[..., n]`."""
        return z.reshape(1, -1) if self.coupled or z.dim() < 1 else z

    def _matrix(self, t: float, z: Tensor) -> tuple[Tensor, Tensor]:
        """I - s ∂f/∂z `[..., n, n]`, and f(t, z)."""
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            value = self.terms(t, point)
            rows = self._rows(value)
            n = rows.shape[-1]
            eye = torch.eye(n, dtype=z.dtype, device=z.device)
            if value.requires_grad:
                each = eye.view(n, *[1] * (rows.dim() - 1), n).expand(n, *rows.shape)
                (slopes,) = torch.autograd.grad(rows, point, each, is_grads_batched=True, allow_unused=True)
            else:
                slopes = None
        if slopes is None:  # f does not depend on the state
            return eye.expand(*rows.shape, n).contiguous(), value.detach()
        slopes = slopes.reshape(n, *rows.shape).movedim(0, -2)
        return eye - self.s * slopes, value.detach()
