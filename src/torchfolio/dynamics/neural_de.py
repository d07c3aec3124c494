"""Neural ordinary and controlled differential equations as modules, and the doors to what they are made of.

Reference:
    Kidger, "On Neural Differential Equations", arXiv 2202.02435: chapters 2 (ordinary), 3 (controlled), 4 (stochastic),
    5 (solvers) and 6 (symbolic regression, implicit layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.dynamics.adjoint_gradient import Adjoint
from torchfolio.dynamics.brownian_grid import BrownianGrid
from torchfolio.dynamics.brownian_interval import BrownianInterval
from torchfolio.dynamics.checkpoint_gradient import Checkpoint
from torchfolio.dynamics.continuous_flow import ContinuousFlow
from torchfolio.dynamics.controls import Control, HermiteControl, LinearControl, NaturalCubicControl, RectilinearControl
from torchfolio.dynamics.equilibrium import DEQ
from torchfolio.dynamics.gradient_base import Direct, Gradient
from torchfolio.dynamics.implicit import QPLayer
from torchfolio.dynamics.implicit_runge_kutta import ImplicitEuler, Kvaerno3
from torchfolio.dynamics.integrate import cdeint, odeint, sdeint
from torchfolio.dynamics.log_signatures import log_signatures
from torchfolio.dynamics.minimizers import argmin_layer
from torchfolio.dynamics.neural_sde import LatentSDE, NeuralSDE
from torchfolio.dynamics.reversible_gradient import Reversible
from torchfolio.dynamics.reversible_heun import ReversibleHeun
from torchfolio.dynamics.runge_kutta import RK4, Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Tsit5
from torchfolio.dynamics.sde import SDE
from torchfolio.dynamics.sde_gan import SDEGAN
from torchfolio.dynamics.sde_solvers import EulerHeun, Milstein, ShARK
from torchfolio.dynamics.solved_module import SolvedModule
from torchfolio.dynamics.solver import Solver
from torchfolio.dynamics.symbolic_regression import SymbolicRegressor
from torchfolio.dynamics.vector_fields import VectorField

__all__ = [
    "DEQ",
    "RK4",
    "SDE",
    "SDEGAN",
    "Adjoint",
    "Bosh3",
    "BrownianGrid",
    "BrownianInterval",
    "Checkpoint",
    "ContinuousFlow",
    "Control",
    "Direct",
    "Dopri5",
    "Euler",
    "EulerHeun",
    "HermiteControl",
    "Heun",
    "ImplicitEuler",
    "Kvaerno3",
    "LatentSDE",
    "LinearControl",
    "Midpoint",
    "Milstein",
    "NaturalCubicControl",
    "NeuralCDE",
    "NeuralODE",
    "NeuralSDE",
    "QPLayer",
    "Ralston",
    "RectilinearControl",
    "Reversible",
    "ReversibleHeun",
    "ShARK",
    "SymbolicRegressor",
    "Tsit5",
    "VectorField",
    "argmin_layer",
    "cdeint",
    "log_signatures",
    "odeint",
    "sdeint",
]


class NeuralODE(SolvedModule):
    """The flow of a field: y(ts) for dy/dt = f(t, y), y(ts[0]) = y0.

    Args:
        field: module or function `(t, y) -> dy/dt`; `VectorField` is one.
        solver: method; `Tsit5()` by default.
        gradient: way to differentiate, as for `odeint`.
        rtol: relative tolerance, at least 0.
        atol: absolute tolerance, above 0.
        dt: length of fixed steps, above 0; steps are adaptive if None and the solver has an error estimate.

    Shapes:
        y0: `[...]` or a tree of such; ts: `[T]`; output: `[T, ...]`.

    Attributes:
        stats: cost of the last solve; None before the first.

    Raises:
        ValueError: if an option is out of range; those of `odeint` when it is called.

    Reference:
        Chapter 2; Chen et al., arXiv 1806.07366.
    """

    def __init__(
        self,
        field: Callable[..., Any],
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        *,
        rtol: float = 1e-5,
        atol: float = 1e-7,
        dt: float | None = None,
    ) -> None:
        super().__init__(solver, gradient, rtol, atol, dt)
        self.field = field

    def extra_repr(self) -> str:
        steps = f"dt={self.dt}" if self.dt is not None else f"rtol={self.rtol}, atol={self.atol}"
        return f"{self.solver}, {steps}"

    def forward(self, y0: Any, ts: Tensor | Sequence[float]) -> Any:
        ys, self.stats = odeint(self.field, y0, ts, self.solver, self.gradient, **self.steps())
        return ys


class NeuralCDE(SolvedModule):
    """A recurrent network in continuous time, for series with irregular times and missing values.

        z(t_0) = ζ(X(t_0)),    dz = f(z) dX,    output = ℓ(z)

    Args:
        channels: number of channels of the series.
        hidden: number of channels of z.
        out: number of outputs.
        control: class of the control X; `HermiteControl` by default.
        width: width of the field's network.
        depth: number of its hidden layers, at least 1.
        append_time: whether time is a channel of X; without it the output cannot depend on speed.
        append_mask: whether counts of observations are channels of X.
        solver: method; `Tsit5()` by default.
        gradient: way to differentiate, as for `cdeint`.
        rtol: relative tolerance, at least 0.
        atol: absolute tolerance, above 0.
        dt: length of fixed steps, above 0, in the control's time; if None adaptive where the solver has an error
            estimate, else from knot to knot.

    Shapes:
        x: `[N, B, channels]`, time first, NaN where a value is missing; t: `[N]`; output: `[B, out]` at the end, or
        `[T, B, out]` at times `ts`.

    Attributes:
        stats: cost of the last solve; None before the first.

    Raises:
        ValueError: if an option is out of range or a series has another number of channels.

    Reference:
        Chapter 3; Kidger et al., arXiv 2005.08926.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        out: int,
        control: type[Control] = HermiteControl,
        *,
        width: int = 128,
        depth: int = 1,
        append_time: bool = True,
        append_mask: bool = False,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-6,
        dt: float | None = None,
    ) -> None:
        super().__init__(solver, gradient, rtol, atol, dt)
        self.channels, self.hidden = whole("channels", channels, 1), whole("hidden", hidden, 1)
        self.control = control
        self.options = {"append_time": append_time, "append_mask": append_mask}
        driving = channels * (2 if append_mask else 1) + append_time
        self.initial = nn.Linear(driving, hidden)
        self.field = VectorField(hidden, width, depth, shape=(hidden, driving), activation=nn.ReLU())
        self.readout = nn.Linear(hidden, whole("out", out, 1))

    def extra_repr(self) -> str:
        return f"{self.control.__name__}, {self.solver}, append_time={self.options['append_time']}"

    def start(self, control: Control) -> Tensor:
        """z(t_0) `[B, hidden]`, from the control's first value."""
        return self.initial(control.evaluate(control.t0))

    def forward(
        self, x: Tensor, t: Tensor | Sequence[float] | None = None, ts: Tensor | Sequence[float] | None = None
    ) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.channels:
            raise ValueError(f"expected series [N, B, {self.channels}], got shape {tuple(x.shape)}")
        control = self.control(x, t, **self.options)
        options = self.steps()
        if self.dt is None and self.solver.error_order is None:
            options["grid"] = control.knots
        z0 = self.start(control)
        z, self.stats = cdeint(control, self.field, z0, ts, self.solver, self.gradient, **options)
        return self.readout(z[-1] if ts is None else z)
