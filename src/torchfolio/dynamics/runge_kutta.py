"""Explicit Runge–Kutta methods by their tableaux."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchfolio.dynamics.solver import Carry, Solver, Step, hermite, shares
from torchfolio.dynamics.terms import Terms

__all__ = ["RK4", "Bosh3", "Dopri5", "Euler", "ExplicitRungeKutta", "Heun", "Midpoint", "Ralston", "Tableau", "Tsit5"]


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit method.

    Attributes:
        a: rows of the stages from the second one on; row i has i + 1 entries.
        b: weights of the solution.
        b_error: weights of the solution minus those of the embedded one, if there is one.
        b_mid: weights of the state at the middle of the step, if the method comes with a quartic interpolant.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_error: tuple[float, ...] | None = None
    b_mid: tuple[float, ...] | None = None

    @property
    def c(self) -> tuple[float, ...]:
        """Times of the stages within the step."""
        return (0.0, *(sum(row) for row in self.a))

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage of a step is the first one of the next."""
        return bool(self.a) and self.b == (*self.a[-1], 0.0)


class ExplicitRungeKutta(Solver):
    """Explicit Runge–Kutta method.

        k_i = f(t + c_i h, y + h Σ_j a_ij k_j),    y' = y + h Σ_i b_i k_i

    For stochastic equations k_i = f h + g ΔW takes the place of h k_i. One stage gives Euler's method for Itô equations;
    with Σ b_i c_i = ½ the method solves Stratonovich ones, at strong order ½, or 1 if the noise commutes.

    A subclass names a tableau and its orders. Between steps the state is the cubic through both ends with their slopes
    (Hermite), or the quartic that also meets the middle of the step.
    """

    tableau: ClassVar[Tableau]

    def step(self, terms: Terms, t0: float, t1: float, y: Tensor, carry: Carry, noise: Any = None) -> Step:
        if noise is not None:
            return self._noisy_step(terms, t0, t1, y, noise)
        tableau, h = self.tableau, t1 - t0
        k = [carry[0] if carry else terms(t0, y)]
        reached = y
        for c, row in zip(tableau.c[1:], tableau.a, strict=True):
            reached = combine(y, k, row, h)
            k.append(terms(t1 if c == 1 else t0 + c * h, reached))
        same = tableau.first_same_as_last
        y1 = reached if same else combine(y, k, tableau.b, h)
        error = None
        if tableau.b_error is not None:
            with torch.no_grad():
                error = combine(None, k, tableau.b_error, h)
        dense = (k[0],) if tableau.b_mid is None else tuple(k)
        return Step(t0, t1, y, y1, (k[-1],) if same else (), error, dense)

    def _noisy_step(self, terms: Terms, t0: float, t1: float, y: Tensor, noise: Any) -> Step:
        tableau, h = self.tableau, t1 - t0
        k = [terms.move(t0, y, h, noise)]
        for c, row in zip(tableau.c[1:], tableau.a, strict=True):
            k.append(terms.move(t1 if c == 1 else t0 + c * h, combine(y, k, row, 1.0), h, noise))
        return Step(t0, t1, y, combine(y, k, tableau.b, 1.0), ())

    def interpolate(self, terms: Terms, step: Step, ts: Sequence[float]) -> Tensor:
        if not step.dense:
            return super().interpolate(terms, step, ts)
        if not step.carry:
            step.carry = (terms(step.end, step.y1),)  # the next step begins with it
        f0, f1 = step.dense[0], step.carry[0]
        y = hermite(step, ts, f0, f1)
        if self.tableau.b_mid is None:
            return y
        # The quartic that meets the middle differs from the cubic by a multiple of x²(1 - x)², which is 1/16 there.
        h, x = step.t1 - step.t0, shares(step, ts)
        middle = combine(step.y0, step.dense, self.tableau.b_mid, h)
        cubic = torch.lerp(step.y0, step.y1, 0.5) + (h / 8) * (f0 - f1)
        return y + (16 * (x * (1 - x)) ** 2) * (middle - cubic)


def combine(y: Tensor | None, k: Sequence[Tensor], weights: Sequence[float], h: float) -> Tensor:
    """y + h Σ w_i k_i, or the sum alone."""
    pairs = [(rate, h * w) for rate, w in zip(k, weights, strict=False) if w]
    total = y
    for i, (rate, w) in enumerate(pairs):
        # In place from the second term on: the tensor is this function's own, and sums save nothing for backward.
        if total is None:
            total = rate * w
        elif i == 0:
            total = torch.add(total, rate, alpha=w)
        else:
            total.add_(rate, alpha=w)
    assert total is not None
    return total


class Euler(ExplicitRungeKutta):
    """Euler's method, order 1; for Itô equations Euler–Maruyama's, strong order ½."""

    order = 1
    calculus = "ito"
    tableau = Tableau((), (1.0,))


class Midpoint(ExplicitRungeKutta):
    """Midpoint method, order 2."""

    order = 2
    calculus = "stratonovich"
    tableau = Tableau(((0.5,),), (0.0, 1.0))


class Heun(ExplicitRungeKutta):
    """Heun's method (trapezoidal), order 2, with Euler's step as the embedded one."""

    order, error_order = 2, 2
    calculus = "stratonovich"
    tableau = Tableau(((1.0,),), (0.5, 0.5), (-0.5, 0.5))


class Ralston(ExplicitRungeKutta):
    """Ralston's method, order 2 with the least error bound, with Euler's step as the embedded one."""

    order, error_order = 2, 2
    calculus = "stratonovich"
    tableau = Tableau(((2 / 3,),), (0.25, 0.75), (-0.75, 0.75))


class Bosh3(ExplicitRungeKutta):
    """Bogacki–Shampine pair of orders 3 and 2."""

    order, error_order = 3, 3
    tableau = Tableau(
        ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0.0),
        (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    )


class RK4(ExplicitRungeKutta):
    """The classical Runge–Kutta method, order 4."""

    order = 4
    tableau = Tableau(((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


class Dopri5(ExplicitRungeKutta):
    """Dormand–Prince pair of orders 5 and 4, with Shampine's quartic interpolant."""

    order, error_order = 5, 5
    tableau = Tableau(
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (
            35 / 384 - 5179 / 57600,
            0.0,
            500 / 1113 - 7571 / 16695,
            125 / 192 - 393 / 640,
            -2187 / 6784 + 92097 / 339200,
            11 / 84 - 187 / 2100,
            -1 / 40,
        ),
        (
            6025192743 / 60171106304,
            0.0,
            51252292925 / 130801643196,
            -2691868925 / 90256659456,
            187940372067 / 3189068634112,
            -1776094331 / 39487288512,
            11237099 / 470086768,
        ),
    )


class Tsit5(ExplicitRungeKutta):
    """Tsitouras' pair of orders 5 and 4, with its quartic interpolant; the usual first choice."""

    order, error_order = 5, 5
    tableau = Tableau(
        (
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (
                0.09646076681806523,
                0.01,
                0.4798896504144996,
                1.379008574103742,
                -3.290069515436081,
                2.324710524099774,
            ),
        ),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
        (
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            0.015151515151515152,
        ),
        (
            -1.0530884977290216 * 0.5 * (0.5 - 1.3299890189751412) * (0.25 - 0.71820142708581755 + 0.7139816917074209),
            0.1017 * 0.25 * (0.25 - 1.0983284169124877 + 1.2949852507374631),
            2.490627285651252793 * 0.25 * (0.25 - 1.192678227360308285 + 1.57803468208092486),
            -16.54810288924490272 * 0.25 * (0.5 - 1.21712927295533244) * (0.5 - 0.61620406037800089),
            47.37952196281928122 * 0.25 * (0.5 - 1.203071208372362603) * (0.5 - 0.658047292653547382),
            -34.87065786149660974 * 0.25 * (0.5 - 1.2) * (0.5 - 2 / 3),
            2.5 * 0.25 * (0.5 - 1) * (0.5 - 0.6),
        ),
    )
