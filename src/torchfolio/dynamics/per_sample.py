"""Adaptive steps for every example of a batch by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.runge_kutta import ExplicitRungeKutta
from torchfolio.dynamics.stepping import Adaptive, SolveError
from torchfolio.dynamics.terms import Stats

__all__ = ["solve_each"]


def solve_each(
    field: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    ts: Sequence[float],
    solver: ExplicitRungeKutta,
    adaptive: Adaptive,
    max_steps: int,
) -> tuple[Tensor, Stats]:
    """Solve dy/dt = f(t, y) with a step length for each example.

    One stiff example does not shorten the steps of the others, and its error does not hide in their mean. The field is
    vectorised over examples by `torch.func.vmap`: it is called with the time of an example and its state. Examples leave
    the batch when they are done. Gradients go through the steps.

    Args:
        field: function or module `(t, y) -> dy/dt` of one example.
        y0: states at `ts[0]` `[B, ...]`.
        ts: times of the outputs, rising or falling.
        solver: explicit method with an error estimate.
        adaptive: rule for the steps; its norm is taken of each example.
        max_steps: maximum number of steps tried by an example.

    Returns:
        states `[T, B, ...]`, and the cost: steps are those of the example that took most.

    Raises:
        SolveError: if the field is not finite, or steps become too many or too small.
    """
    batch = _Batch(field, y0, ts, solver, adaptive)
    tried = 0
    while len(batch.who):
        if (tried := tried + 1) > max_steps:
            raise SolveError(
                f"more than max_steps = {max_steps} steps were tried by {len(batch.who)} of {len(y0)} examples"
            )
        batch.advance()
    return batch.outputs, batch.stats


class _Batch:
    """Examples that are still on their way, in time units that rise.

    Attributes:
        who: their numbers `[A]`.
        t: their times `[A]`, in 64 bits.
        h: lengths of their next steps `[A]`.
        y: their states `[A, ...]`.
        slope: their slopes.
        next: number of the output that each comes to next.
        outputs: states at all times asked for `[T, B, ...]`.
    """

    def __init__(
        self, field: Callable[..., Any], y0: Tensor, ts: Sequence[float], solver: ExplicitRungeKutta, adaptive: Adaptive
    ) -> None:
        self.field, self.solver, self.adaptive, self.stats = torch.func.vmap(field), solver, adaptive, Stats()
        self.sign = 1.0 if ts[-1] > ts[0] else -1.0
        self.ts = self.sign * torch.tensor(ts, dtype=torch.float64, device=y0.device)
        assert solver.error_order is not None
        self.p = solver.error_order
        self.norm = torch.func.vmap(adaptive.norm)
        n = len(y0)
        self.who = torch.arange(n, device=y0.device)
        self.next = torch.ones_like(self.who)
        self.t = self.ts[0].repeat(n)
        self.y, self.outputs = y0, y0.new_zeros(len(ts), *y0.shape)
        self.outputs[0] = y0
        self.steps, self.rejected = torch.zeros_like(self.who), torch.zeros_like(self.who)
        self.before = torch.ones_like(self.t)
        self.slope = self.rate(self.t, y0)
        self.h = self.first()

    def rate(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt at times and states of examples; with the sign of a march in rising time."""
        self.stats.nfe_forward += 1
        value = self.field((self.sign * t).to(y.dtype), y)
        if value.shape != y.shape:
            raise ValueError(
                f"expected the field's output of an example's shape {tuple(y.shape[1:])}, got {tuple(value.shape[1:])}"
            )
        return self.sign * value

    @torch.no_grad()
    def first(self) -> Tensor:
        """Lengths of the first steps by Hairer's rule."""
        if self.adaptive.first_step is not None:
            return torch.full_like(self.t, self.adaptive.first_step)
        scale = self.adaptive.atol + self.adaptive.rtol * self.y.abs()
        d0, d1 = (self.norm(v / scale).double() for v in (self.y, self.slope))
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        f1 = self.rate(self.t + h0, self.y + self.column(h0) * self.slope)
        d2 = self.norm((f1 - self.slope) / scale).double() / h0
        most = torch.maximum(d1, d2)
        h1 = torch.where(most <= 1e-15, (1e-3 * h0).clamp_min(1e-6), (0.01 / most) ** (1 / self.p))
        h = torch.minimum(100 * h0, h1)
        return torch.where(h.isfinite(), h, 1e-6)

    def column(self, v: Tensor) -> Tensor:
        return v.to(self.y.dtype).view(-1, *[1] * (self.y.dim() - 1))

    def advance(self) -> None:
        """Try one step of each, keep those whose error is small enough, and let go of who is done."""
        left = self.ts[-1] - self.t
        last = self.h >= left * (1 - 1e-6)
        h = torch.where(last, left, self.h)
        k, y1, error = self.stages(h)
        with torch.no_grad():
            scale = self.adaptive.atol + self.adaptive.rtol * torch.maximum(self.y.abs(), y1.abs())
            ratio = self.norm(error / scale).double()
            good = ratio <= 1
            self.refuse(ratio, h, good)
            factor = self.factor(ratio)
        t1 = torch.where(last, self.ts[-1], self.t + h)
        self.read_off(t1, y1, k, h, good)
        self.steps[self.who] += good
        self.rejected[self.who] += ~good
        self.stats.n_steps, self.stats.n_rejected = int(self.steps.max()), int(self.rejected.max())
        accepted = self.column(good).bool()
        same = self.solver.tableau.first_same_as_last
        slope1 = k[-1] if same else self.rate(t1, y1)
        self.y, self.slope = torch.where(accepted, y1, self.y), torch.where(accepted, slope1, self.slope)
        self.t = torch.where(good, t1, self.t)
        self.h = torch.where(good, factor, factor.clamp_max(1.0)) * h
        self.before = torch.where(good, ratio.clamp_min(1e-4), self.before)
        going = ~(good & last)
        if not bool(going.all()):
            names = ("who", "t", "h", "y", "slope", "next", "before")
            self.__dict__.update({name: getattr(self, name)[going] for name in names})

    def stages(self, h: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Slopes at the stages, the states reached and the estimated errors."""
        tableau, width = self.solver.tableau, self.column(h)
        k, reached = [self.slope], self.y
        for c, row in zip(tableau.c[1:], tableau.a, strict=True):
            reached = self.y + width * _sum(k, row)
            k.append(self.rate(self.t + c * h, reached))
        y1 = reached if tableau.first_same_as_last else self.y + width * _sum(k, tableau.b)
        assert tableau.b_error is not None
        return k, y1, (width * _sum(k, tableau.b_error)).detach()

    def factor(self, ratio: Tensor) -> Tensor:
        """Length of the next step over that of this one."""
        first, second = (0.7, 0.4) if self.adaptive.pi else (1.0, 0.0)
        factor = 0.9 * ratio ** (-first / self.p) * self.before ** (second / self.p)
        return torch.where(ratio.isfinite(), factor.clamp(0.2, 10.0), 0.2)

    def refuse(self, ratio: Tensor, h: Tensor, good: Tensor) -> None:
        tiny = torch.finfo(self.y.dtype).eps
        short = ~good & (h <= 4 * tiny * self.t.abs().clamp_min(tiny))
        if bool(short.any()):
            i = int(short.nonzero()[0])
            what = "too stiff or singular" if bool(ratio[i].isfinite()) else "NaN or infinite"
            time = self.sign * float(self.t[i])
            raise SolveError(f"the field is {what} at t = {time:.6g} for example {int(self.who[i])}")

    def read_off(self, t1: Tensor, y1: Tensor, k: list[Tensor], h: Tensor, good: Tensor) -> None:
        """Note the states at the times within accepted steps, by the cubic through both ends with their slopes."""
        f1: Tensor | None = k[-1] if self.solver.tableau.first_same_as_last else None
        while True:
            wanted = self.ts[self.next.clamp_max(len(self.ts) - 1)]
            inside = good & (self.next < len(self.ts)) & (wanted <= t1)
            if not bool(inside.any()):
                return
            f1 = self.rate(t1, y1) if f1 is None else f1
            x = self.column((wanted - self.t) / h)
            y = torch.lerp(self.y, y1, x * x * (3 - 2 * x))
            y = y + self.column(h) * (x * (1 - x) ** 2 * k[0] - x * x * (1 - x) * f1)
            if self.solver.tableau.b_mid is not None:
                # As for one step for all: the quartic that also meets the middle.
                middle = self.y + self.column(h) * _sum(k, self.solver.tableau.b_mid)
                cubic = torch.lerp(self.y, y1, 0.5) + self.column(h) / 8 * (k[0] - f1)
                y = y + 16 * (x * (1 - x)) ** 2 * (middle - cubic)
            y = torch.where(x == 1, y1, y)
            self.outputs[self.next[inside], self.who[inside]] = y[inside]
            self.next = self.next + inside


def _sum(k: Sequence[Tensor], weights: Sequence[float]) -> Any:
    return sum(w * rate for rate, w in zip(k, weights, strict=False) if w)
