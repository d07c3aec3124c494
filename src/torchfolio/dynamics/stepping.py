"""The march of a solver over time: which steps it takes, and what is read off at the times asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.dynamics.solver import Carry, Solver, Step
from torchfolio.dynamics.terms import Terms
from torchfolio.errors import TorchfolioError
from torchfolio.shown import Shown

__all__ = ["Adaptive", "Outputs", "Problem", "SolveError", "march", "read_off", "rms"]

NEAR = 1e-6  # of a step: times as close as this are one


class SolveError(TorchfolioError, RuntimeError):
    """A solve could not go on: the field is not finite, or the steps became too many or too small."""


def rms(x: Tensor) -> Tensor:
    """Root mean square over the whole state."""
    return torch.linalg.vector_norm(x) / math.sqrt(x.numel())


@dataclass(frozen=True, repr=False)
class Adaptive(Shown):
    """Steps chosen by the error estimate.

    A step is accepted if the norm of error / (atol + rtol · max(|y0|, |y1|)) is at most 1; the next one is longer or
    shorter by 0.9 r^(-β₁) r_before^(β₂), within [0.2, 10], where r is that norm.

    Args:
        rtol: relative tolerance, at least 0.
        atol: absolute tolerance, above 0.
        pi: whether the ratio before counts too (β₁ = 0.7 / p, β₂ = 0.4 / p in place of β₁ = 1 / p, β₂ = 0).
        norm: norm of a packed state; the root mean square by default.
        first_step: length of the first step; by Hairer's rule if None.
    """

    rtol: float = 1e-5
    atol: float = 1e-7
    pi: bool = False
    norm: Callable[[Tensor], Tensor] = rms
    first_step: float | None = None

    def ratio(self, step: Step) -> float:
        """Error over tolerance."""
        assert step.error is not None
        with torch.no_grad():
            scale = torch.maximum(step.y0.abs(), step.y1.abs()).mul_(self.rtol).add_(self.atol)
            return float(self.norm(step.error / scale))

    def factor(self, ratio: float, before: float, p: int) -> float:
        """Length of the next step over that of this one."""
        if not math.isfinite(ratio):
            return 0.2
        if ratio == 0:
            return 10.0
        power = ratio ** (-0.7 / p) * before ** (0.4 / p) if self.pi else ratio ** (-1 / p)
        return min(10.0, max(0.2, 0.9 * power))

    def first(self, terms: Terms, t0: float, y: Tensor, direction: float, p: int) -> tuple[float, Tensor]:
        """Length of the first step by Hairer's rule (Solving Ordinary Differential Equations I, II.4), and f(t0, y)."""
        f0 = terms(t0, y)
        if not bool(f0.isfinite().all()):
            raise SolveError(f"the field is NaN or infinite at t = {t0:.6g}")
        with torch.no_grad():
            scale = self.atol + self.rtol * y.abs()
            d0, d1 = float(self.norm(y / scale)), float(self.norm(f0 / scale))
            h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
            f1 = terms(t0 + direction * h0, y + direction * h0 * f0)
            d2 = float(self.norm((f1 - f0) / scale)) / h0
        # (0.01 / max)^(1 / p) balances the leading error term; p is the order of the embedded solution plus 1.
        h1 = max(1e-6, 1e-3 * h0) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / p)
        h = min(100 * h0, h1)
        return h if math.isfinite(h) else 1e-6, f0


@dataclass
class Problem:
    """A solve that was asked for.

    Attributes:
        terms: right-hand side.
        solver: method.
        ts: times of the outputs, rising or falling.
        grid: times of the steps; None for adaptive ones.
        adaptive: rule by which steps are chosen where there is no grid.
        noise: Brownian motion with `increment(t0, t1)` and `area(t0, t1)`; None for ordinary equations.
        jumps: times at which the field jumps, which steps meet exactly: an ordered set, in the order of `ts`.
        max_steps: maximum number of steps that are tried.
        last_step: length of the last step that was not cut short, for a solve that follows.
    """

    terms: Terms
    solver: Solver
    ts: Sequence[float]
    grid: Sequence[float] | None = None
    adaptive: Adaptive = field(default_factory=Adaptive)
    noise: Any = None
    jumps: Mapping[float, None] = field(default_factory=dict)
    max_steps: int = 100_000
    last_step: float | None = None

    def sides(self, t0: float, t1: float) -> tuple[float, float]:
        """Ends of a step as the field sees them: just after a jump at its start, just before one at its end."""
        if not self.jumps:
            return t0, t1
        dtype = np.float64 if self.terms.packing.dtype == torch.float64 else np.float32
        a = float(np.nextafter(dtype(t0), dtype(t1))) if t0 in self.jumps else t0
        b = float(np.nextafter(dtype(t1), dtype(t0))) if t1 in self.jumps else t1
        return a, b

    def step(self, t0: float, t1: float, y: Tensor, carry: Carry | None) -> Step:
        """One step; a carry of None, or one from before a jump, starts afresh."""
        a, b = self.sides(t0, t1)
        if carry is None or a != t0:
            carry = self.solver.start(self.terms, a, y)
        noise = None
        if self.noise is not None:
            noise = self.noise.area(t0, t1) if self.solver.needs_area else self.noise.increment(t0, t1)
        step = self.solver.step(self.terms, a, b, y, carry, noise)
        step.t0, step.t1, step.end = t0, t1, b
        return step


def march(problem: Problem, y: Tensor, carry: Carry | None = None, grid: Sequence[float] | None = None) -> Iterator:
    """Steps from the first to the last time.

    Args:
        problem: problem to solve.
        y: packed state at the first time.
        carry: values that the solver is handed at first, if they are known.
        grid: times of the steps, in place of the problem's.

    Yields:
        Steps, as they are accepted.

    Raises:
        SolveError: if the field is not finite, or steps become too many or too small.
    """
    grid = problem.grid if grid is None else grid
    if grid is None:
        yield from _march_adaptively(problem, y, carry)
        return
    for t0, t1 in itertools.pairwise(grid):
        step = problem.step(t0, t1, y, carry)
        yield step
        y, carry = step.y1, step.carry


def _march_adaptively(problem: Problem, y: Tensor, carry: Carry | None) -> Iterator:
    terms, solver, adaptive = problem.terms, problem.solver, problem.adaptive
    t, end, p = problem.ts[0], problem.ts[-1], solver.error_order
    direction = math.copysign(1.0, end - t)
    assert p is not None
    h = problem.last_step or adaptive.first_step
    if h is None:
        a, _ = problem.sides(t, end)
        h, f0 = adaptive.first(terms, a, y, direction, p)
        # The evaluation serves as the first stage too. Reversible Heun wants its own start.
        carry = (f0,) if carry is None and a == t and not solver.reversible else carry
    stops = [s for s in problem.jumps if (s - t) * direction > 0 and (end - s) * direction > 0] + [end]
    tiny = torch.finfo(terms.packing.dtype).eps
    tried, before, k = 0, 1.0, 0
    while t != end:
        if (tried := tried + 1) > problem.max_steps:
            raise SolveError(f"more than max_steps = {problem.max_steps} steps were tried, up to t = {t:.6g}")
        left = (stops[k] - t) * direction
        cut = h >= left * (1 - NEAR)  # not to leave a sliver
        t1 = stops[k] if cut else t + direction * h
        step = problem.step(t, t1, y, carry)
        ratio = adaptive.ratio(step)
        factor = adaptive.factor(ratio, before, p)
        length = abs(t1 - t)
        if ratio <= 1:
            problem.last_step = h = max(h, factor * length) if cut else factor * length
            yield step
            t, y, carry, before = t1, step.y1, step.carry, max(ratio, 1e-4)
            k += t1 == stops[k] and t1 != end
            continue
        terms.stats.n_rejected += not terms.backward
        terms.stats.n_rejected_backward += terms.backward
        h = min(1.0, factor) * length
        # A first stage serves the next attempt as well.
        carry = carry if carry or solver.reversible else step.dense[:1]
        if h <= 4 * tiny * max(abs(t), tiny):
            what = (
                "is NaN or infinite"
                if not math.isfinite(ratio)
                else "is singular, or too stiff for this solver and tolerance,"
            )
            raise SolveError(f"the field {what} at t = {t:.6g}: the step shrank to {h:.3g}")


class Outputs(Shown):
    """States at the times asked for, collected while a solver marches.

    Args:
        problem: problem that is solved.
        first: index of the first time that is still to come.
    """

    def __init__(self, problem: Problem, first: int) -> None:
        self.problem, self.next = problem, first
        self.direction = math.copysign(1.0, problem.ts[-1] - problem.ts[0])

    def of(self, step: Step) -> list[Tensor]:
        """States at the times within a step, its end included."""
        ts, problem, inside = self.problem.ts, self.problem, []
        while self.next < len(ts) and (step.t1 - ts[self.next]) * self.direction > 0:
            inside.append(ts[self.next])
            self.next += 1
        outputs = list(problem.solver.interpolate(problem.terms, step, inside).unbind(0)) if inside else []
        if self.next < len(ts) and step.t1 == ts[self.next]:
            outputs.append(step.y1)
            self.next += 1
        return outputs


def read_off(problem: Problem, y0: Tensor, on_step: Callable[[Step], None] | None = None) -> list[Tensor]:
    """States at all times asked for.

    Args:
        problem: problem to solve.
        y0: packed state at the first time.
        on_step: function called with each accepted step, after its outputs were read.

    Returns:
        One state a time, the first being `y0`.
    """
    outputs, ys, times, sums = Outputs(problem, 1), [y0], [], []
    stats, backward = problem.terms.stats, problem.terms.backward
    for step in march(problem, y0):
        ys += outputs.of(step)
        if problem.grid is not None:
            times.append(step.t1)
            sums.append(step.y1.detach().sum())
        if backward:
            stats.n_steps_backward += 1
        else:
            stats.n_steps += 1
        if on_step is not None:
            on_step(step)
    if sums:
        # One look at the end, so that no step waits for the device.
        finite = torch.stack(sums).isfinite()
        if not bool(finite.all()):
            t = times[int((~finite).nonzero()[0])]
            raise SolveError(f"the field or the state is NaN or infinite at t = {t:.6g}; smaller steps may help")
    return ys
