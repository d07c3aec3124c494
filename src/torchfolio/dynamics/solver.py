"""What a solver of differential equations is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.terms import Terms
from torchfolio.shown import Shown

__all__ = ["Carry", "Solver", "Step", "hermite", "shares"]

Carry = tuple[Tensor, ...]
"""What a solver hands from one step to the next, besides the state."""


@dataclass(slots=True)
class Step:
    """One step of a solver.

    Attributes:
        t0: time before it.
        t1: time after it; earlier than `t0` when time runs backwards.
        y0: state before it.
        y1: state after it.
        carry: values that the next step is handed.
        error: estimate of the local error, detached, of the methods that have one.
        dense: values that interpolation within the step needs.
        end: `t1` as the field sees it, just before a jump.
    """

    t0: float
    t1: float
    y0: Tensor
    y1: Tensor
    carry: Carry
    error: Tensor | None = None
    dense: Carry = ()
    end: float = math.nan


class Solver(Shown, ABC):
    """A one-step method. Subclasses give `step`; solvers have no state of their own.

    Attributes:
        order: order of convergence for ordinary equations, or the strong order for stochastic ones with general noise.
        error_order: order of the local error estimate, which is the lower order of an embedded pair plus 1; None if
            there is no estimate, and the solver takes fixed steps only.
        calculus: calculus of the stochastic equations that it solves, "ito" or "stratonovich"; None if it solves
            ordinary ones only.
        ordinary: whether it solves ordinary equations.
        reversible: whether a step can be undone, so that `Reversible` applies.
        implicit: whether a step solves equations that involve the field's Jacobian.
        needs_area: whether it is handed the space-time Lévy area beside the Brownian increment.
    """

    order: float
    error_order: int | None = None
    calculus: str | None = None
    ordinary: bool = True
    reversible: bool = False
    implicit: bool = False
    needs_area: bool = False

    def start(self, terms: Terms, t: float, y: Tensor) -> Carry:
        """What the first step is handed, and every step after a jump."""
        return ()

    @abstractmethod
    def step(self, terms: Terms, t0: float, t1: float, y: Tensor, carry: Carry, noise: Any = None) -> Step:
        """Go from `t0` to `t1`.

        Args:
            terms: right-hand side.
            t0: time of the state.
            t1: time to reach.
            y: state at `t0`.
            carry: values that the step before left, or `start`.
            noise: Brownian increment from `t0` to `t1`, with the area if `needs_area`; None for ordinary equations.
        """

    def interpolate(self, terms: Terms, step: Step, ts: Sequence[float]) -> Tensor:
        """States at times within a step `[len(ts), ...]`; on the straight line unless a solver knows better."""
        return torch.lerp(step.y0, step.y1, shares(step, ts))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def shares(step: Step, ts: Sequence[float]) -> Tensor:
    """Times as shares of a step, to be broadcast with its state."""
    x = [(t - step.t0) / (step.t1 - step.t0) for t in ts]
    return step.y0.new_tensor(x).view(-1, *[1] * step.y0.dim())


def hermite(step: Step, ts: Sequence[float], f0: Tensor, f1: Tensor) -> Tensor:
    """States within a step, on the cubic through both ends with their slopes."""
    h, x = step.t1 - step.t0, shares(step, ts)
    y = torch.lerp(step.y0, step.y1, x * x * (3 - 2 * x))
    return y + (h * x * (1 - x) ** 2) * f0 - (h * x * x * (1 - x)) * f1
