"""Solvers of stochastic equations only. `Euler` (Itô), `Heun`, `Midpoint`, `Ralston` and `ReversibleHeun`
(Stratonovich) solve both kinds and stand elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.sde import SDETerms
from torchfolio.dynamics.solver import Carry, Solver, Step
from torchfolio.dynamics.terms import Terms

__all__ = ["EulerHeun", "Milstein"]


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
