"""The base of modules that solve a differential equation of their own by adaptive or fixed steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchfolio.checks import at_least, positive
from torchfolio.dynamics.gradient_base import Gradient
from torchfolio.dynamics.runge_kutta import Tsit5
from torchfolio.dynamics.solver import Solver

__all__ = ["SolvedModule"]


class SolvedModule(nn.Module):
    """A module with a solver, a gradient, and lengths of steps.

    Args:
        solver: method; `Tsit5()` by default.
        gradient: way to differentiate, as for `odeint`.
        rtol: relative tolerance, at least 0.
        atol: absolute tolerance, above 0.
        dt: length of fixed steps, above 0; steps are adaptive if None and the solver has an error estimate.

    Attributes:
        stats: cost of the last solve; None before the first.

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self, solver: Solver | None, gradient: Gradient | None, rtol: float, atol: float, dt: float | None
    ) -> None:
        super().__init__()
        self.solver, self.gradient = solver or Tsit5(), gradient
        self.rtol, self.atol = at_least("rtol", rtol, 0), positive("atol", atol)
        self.dt = None if dt is None else positive("dt", dt)
        self.stats: Any = None

    def steps(self) -> dict[str, Any]:
        """What `odeint` and `cdeint` are told of the steps."""
        return {"rtol": self.rtol, "atol": self.atol, "dt": self.dt}
