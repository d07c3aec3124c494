"""The exact gradient of a solve by a solver that runs backwards."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.gradient_base import Recomputed, plus
from torchfolio.dynamics.reversible_heun import ReversibleHeun
from torchfolio.dynamics.solver import Step
from torchfolio.dynamics.stepping import Problem, read_off

__all__ = ["Reversible"]

RETURN = 1e-3  # how far off the way back may end, relative to the largest state


class Reversible(Recomputed):
    """The exact gradient at constant memory: the solver is run backwards, step by step.

    Only for solvers whose steps can be undone, such as `ReversibleHeun`. One evaluation of the field and one product
    with its Jacobian a step. Where the field jumps one more state is kept. Warns if rounding kept the way back from ending
    where the way out began.

    Reference:
        Kidger, "On Neural Differential Equations", section 5.3.2.
    """

    def check(self, problem: Problem, y0: Tensor) -> None:
        if not isinstance(problem.solver, ReversibleHeun):
            raise ValueError(
                f"expected a reversible solver such as ReversibleHeun() for the gradient Reversible(), got {problem.solver}"
            )
        super().check(problem, y0)

    def forward(self, problem: Problem, y0: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
        times, saved, ends = [problem.ts[0]], [], []
        jumps, end = problem.jumps, problem.ts[-1]

        def on_step(step: Step) -> None:
            times.append(step.t1)
            if step.t1 == end or step.t1 in jumps:
                ends.append(len(times) - 1)
                saved.extend((step.y1, step.carry[0]))

        return read_off(problem, y0, on_step), saved, (times, ends)

    def backward(
        self, problem: Problem, ys: Tensor, kept: Sequence[Tensor], rest: Any, a: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        times, ends = rest
        solver, terms, ts = problem.solver, problem.terms, problem.ts
        assert isinstance(solver, ReversibleHeun)
        a_params: list[Any] = [None] * len(terms.params)
        a_y, k = torch.zeros_like(ys), len(ts) - 1
        for j in range(len(ends) - 1, -1, -1):
            begin, end = (ends[j - 1] if j else 0), ends[j]
            y, z = kept[2 * j], kept[2 * j + 1]
            at = terms.linearised(problem.sides(times[end - 1], times[end])[1], z)
            # Nothing depends on the last second state and rates.
            cotangents = (a_y, torch.zeros_like(z), *(torch.zeros_like(r) for r in at.rates))
            for n in range(end, begin, -1):
                t0, t1 = times[n - 1], times[n]
                to_y1, to_y0, k = _outputs_between(ts, a, k, t0, t1)
                noise = None if problem.noise is None else problem.noise.increment(t0, t1)
                cotangents = (plus(cotangents[0], to_y1), *cotangents[1:])
                y, z, at, cotangents, grads = solver.reverse(terms, *problem.sides(t0, t1), noise, y, z, at, cotangents)
                cotangents = (plus(cotangents[0], to_y0), *cotangents[1:])
                a_params = [plus(p, g) for p, g in zip(a_params, grads, strict=True)]
            _check_return(y, [ys, *kept[::2]], j)
            # The piece began with z = y and the rates there.
            back, grads = at.pull(cotangents[2:])
            a_params = [plus(p, g) for p, g in zip(a_params, grads, strict=True)]
            a_y = cotangents[0] + cotangents[1] + back
        return a_y + a[0], a_params

    def __repr__(self) -> str:
        return "Reversible()"


def _check_return(found: Tensor, known: Sequence[Tensor], j: int) -> None:
    """Warn if the way back did not lead to the state that the way out began from: the gradient is wrong then.

    Args:
        found: state at the beginning of piece j, from the way back.
        known: states at the beginnings of all pieces, and at the end.
        j: number of the piece.
    """
    scale = torch.stack([y.norm() for y in known]).max().clamp_min(torch.finfo(found.dtype).tiny)
    gap = float((found - known[j]).norm() / scale)
    if not gap <= RETURN:
        warnings.warn(
            f"run backwards, the solver came to a state {gap:.1g} (relative to the largest) off the one it began from, and the gradient is "
            "wrong: rounding grows along fields with strong damping; take shorter steps, float64, or another gradient",
            stacklevel=2,
        )


def _outputs_between(
    ts: Sequence[float], a: Tensor, k: int, t0: float, t1: float
) -> tuple[Tensor | None, Tensor | None, int]:
    """Gradients in the ends of a step from those in outputs after t0 up to t1 (interpolation is linear)."""
    to_y1 = to_y0 = None
    while k > 0 and abs(ts[k] - t0) > 0 and (ts[k] - t0) * (t1 - t0) > 0:
        x = (ts[k] - t0) / (t1 - t0)
        to_y1 = plus(to_y1, a[k] * x)
        to_y0 = plus(to_y0, a[k] * (1 - x)) if x != 1 else to_y0
        k -= 1
    return to_y1, to_y0, k
