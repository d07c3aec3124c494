"""Solvers of stochastic equations only. `Euler` (Itô), `Heun`, `Midpoint`, `Ralston` and `ReversibleHeun`
(Stratonovich) solve both kinds and stand elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.sde import SDETerms
from torchfolio.dynamics.solver import Carry, Solver, Step
from torchfolio.dynamics.terms import Terms

__all__ = ["EulerHeun", "Milstein", "ShARK"]


class Milstein(Solver):
    """Milstein's method for Itô equations with diagonal noise, strong order 1.

        y' = y + f h + g ΔW + ½ g ∂g/∂y (ΔW² - h)

    Each channel of g may depend on its own channel of y only, as diagonal noise in the strict sense asks.
    """

    order = 1.0
    calculus = "ito"
    ordinary = False
    noises = ("diagonal", "additive")

    def step(self, terms: Terms, t0: float, t1: float, y: Tensor, carry: Carry, noise: Any = None) -> Step:
        assert isinstance(terms, SDETerms)
        h = t1 - t0
        needed = torch.is_grad_enabled()
        with torch.enable_grad():
            point = y if y.requires_grad else y.detach().requires_grad_()
            f, g = terms.rates(t0, point)
            correction = torch.zeros_like(y)
            if terms.sde.noise == "diagonal" and g.requires_grad:
                weight = 0.5 * g * (noise**2 - h)
                grads = torch.autograd.grad(g, point, weight, create_graph=needed, allow_unused=True, retain_graph=True)
                correction = correction if grads[0] is None else grads[0]
        y1 = y + terms.increment((f, g), h, noise) + correction
        return Step(t0, t1, y, y1 if needed else y1.detach(), ())


class EulerHeun(Solver):
    """Euler–Heun method for Stratonovich equations: Euler's step in the drift, Heun's in the diffusion.

        y' = y + f(t, y) h + ½ (g(t, y) + g(t', y + g(t, y) ΔW)) ΔW

    Strong order ½, and 1 with additive, scalar or commutative noise.
    """

    order = 0.5
    calculus = "stratonovich"
    ordinary = False

    def step(self, terms: Terms, t0: float, t1: float, y: Tensor, carry: Carry, noise: Any = None) -> Step:
        f, g = terms.rates(t0, y)
        guess = y + terms.increment((f, g), 0.0, noise)
        _, g1 = terms.rates(t1, guess)
        return Step(t0, t1, y, y + terms.increment((f, (g + g1) / 2), t1 - t0, noise), ())


class ShARK(Solver):
    """Shifted additive-noise Runge–Kutta method, strong order 1.5 for additive noise with two evaluations a step.

        z = y + g H,    z' = z + ⁵⁄₆ (f(t, z) h + g ΔW),    y' = y + (⅖ f(t, z) + ⅗ f(t + ⁵⁄₆ h, z')) h + g ΔW

    H is the space-time Lévy area of the Brownian path: hand a `BrownianInterval` with `levy=True`, or a `BrownianGrid`,
    as by default. For additive noise both calculi agree; declare the equation as a Stratonovich one.

    Reference:
        Foster, dos Reis, Strange, High Order Splitting Methods for SDEs Satisfying a Commutativity Condition, SIAM J.
        Numer. Anal. 62, 2024 (arXiv 2210.17543).
    """

    order = 1.5
    calculus = "stratonovich"
    ordinary = False
    needs_area = True
    noises = ("additive",)

    def step(self, terms: Terms, t0: float, t1: float, y: Tensor, carry: Carry, noise: Any = None) -> Step:
        h, (w, area) = t1 - t0, noise
        # g does not depend on the state, so both stages share its value at the start of the step.
        _, g = terms.rates(t0, y)
        none = torch.zeros_like(y)
        start = y + terms.increment((none, g), 0.0, area)
        moved = terms.increment((none, g), 0.0, w)
        f = terms.rates(t0, start)[0]
        f1 = terms.rates(t0 + 5 / 6 * h, start + 5 / 6 * (f * h + moved))[0]
        return Step(t0, t1, y, y + (0.4 * f + 0.6 * f1) * h + moved, ())
