"""The reversible Heun method: each step can be undone exactly, so its gradient is exact at constant memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchfolio.dynamics.solver import Carry, Solver, Step
from torchfolio.dynamics.terms import Linearised, Terms

__all__ = ["ReversibleHeun"]


class ReversibleHeun(Solver):
    """Reversible Heun method, for ordinary and for Stratonovich equations, with one evaluation a step.

        z' = 2y - z + f h + g ΔW,    f', g' = f, g(t', z'),    y' = y + ½ (f + f') h + ½ (g + g') ΔW

    A second state z, which starts at y, runs along. Order 2 for ordinary equations, strong order ½ for stochastic ones
    and 1 with additive noise. For linear equations it is stable on the segment [-i, i] only: nothing is damped, so use
    it with bounded fields such as ones that end in tanh.

    Reference:
        Kidger, "On Neural Differential Equations", section 5.3.2; Kidger et al., arXiv 2105.13493.
    """

    order, error_order = 2, 2
    calculus = "stratonovich"
    reversible = True

    def start(self, terms: Terms, t: float, y: Tensor) -> Carry:
        return (y, *terms.rates(t, y))

    def step(self, terms: Terms, t0: float, t1: float, y: Tensor, carry: Carry, noise: Any = None) -> Step:
        h = t1 - t0
        z, *rates = carry
        z1 = 2 * y - z + terms.increment(rates, h, noise)
        rates1 = terms.rates(t1, z1)
        y1 = y + terms.increment([(r + r1) / 2 for r, r1 in zip(rates, rates1, strict=True)], h, noise)
        error = ((rates1[0] - rates[0]) * (h / 2)).detach()
        return Step(t0, t1, y, y1, (z1, *rates1), error)

    def reverse(
        self, terms: Terms, t0: float, t1: float, noise: Any, y1: Tensor, z1: Tensor, at: Linearised, cotangents: Carry
    ) -> tuple[Tensor, Tensor, Linearised, Carry, list[Tensor]]:
        """Undo a step and pull the gradient through it, with one evaluation and one product with the Jacobian.

        Args:
            terms: right-hand side.
            t0: time to go back to.
            t1: time of the state.
            noise: Brownian increment from `t0` to `t1`.
            y1: state at `t1`.
            z1: second state at `t1`.
            at: terms at `t1` and `z1`.
            cotangents: gradients of the loss in `y1`, `z1` and the rates at `t1`.

        Returns:
            both states and the terms at `t0`, the gradients in them, and those in the parameters.
        """
        h = t1 - t0
        a_y, a_z, *a_rates = cotangents
        # y' depends on both rates, and the new ones on z' and the parameters.
        half = [w / 2 for w in terms.increment_cotangents(a_y, h, noise)]
        a_back, a_params = at.pull([a + w for a, w in zip(a_rates, half, strict=True)])
        a_z = a_z + a_back
        through = terms.increment_cotangents(a_z, h, noise)
        before = (a_y + 2 * a_z, -a_z, *(w + v for w, v in zip(half, through, strict=True)))
        z = 2 * y1 - z1 - terms.increment(at.rates, h, noise)
        start = terms.linearised(t0, z)
        mean = [(r + r1) / 2 for r, r1 in zip(start.rates, at.rates, strict=True)]
        return y1 - terms.increment(mean, h, noise), z, start, before, a_params
