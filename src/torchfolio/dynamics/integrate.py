"""The driver: solve a differential equation from its first state, and read it off at the times asked for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, positive, whole
from torchfolio.dynamics.brownian_grid import BrownianGrid
from torchfolio.dynamics.brownian_path import Brownian
from torchfolio.dynamics.checkpoint_gradient import Checkpoint
from torchfolio.dynamics.controls import Control
from torchfolio.dynamics.gradient_base import Direct, Gradient, check_gradient
from torchfolio.dynamics.per_sample import solve_each
from torchfolio.dynamics.reversible_gradient import Reversible
from torchfolio.dynamics.reversible_heun import ReversibleHeun
from torchfolio.dynamics.runge_kutta import Euler, ExplicitRungeKutta, Tsit5
from torchfolio.dynamics.sde import SDE, SDETerms
from torchfolio.dynamics.solve_times import _few, _floats, jump_times, output_times, step_grid
from torchfolio.dynamics.solver import Solver
from torchfolio.dynamics.stepping import Adaptive, Problem
from torchfolio.dynamics.terms import Packing, Stats, Terms
from torchfolio.dynamics.used_parameters import refuse_random_layers

__all__ = ["Solution", "cdeint", "odeint", "sdeint"]

FEW_STEPS = 200  # up to so many fixed steps are differentiated directly


class Solution(NamedTuple):
    """What a solve gives.

    Attributes:
        ys: states at all times, of the form of `y0` with time as a further first axis.
        stats: cost of the solve.
    """

    ys: Any
    stats: Stats


def odeint(
    field: Callable[..., Any],
    y0: Any,
    ts: Tensor | Sequence[float],
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    dt: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    params: Iterable[Tensor] = (),
    jump_ts: Tensor | Sequence[float] = (),
    adaptive: Adaptive | None = None,
    per_sample: bool = False,
    max_steps: int = 100_000,
) -> Solution:
    """Solve the ordinary differential equation dy/dt = f(t, y).

    Steps are chosen by the error estimate where the solver has one and neither `dt` nor `grid` is given, one step for
    the whole batch unless `per_sample`. Outputs are read off between steps by interpolation, never by shortening them.

    Args:
        field: function or module `(t, y) -> dy/dt`; `t` is a tensor without axes, the result has the form of `y`.
        y0: state at `ts[0]`: a tensor in floating point, or nested lists, tuples and dicts of such.
        ts: times of the outputs `[T]`, at least 2, strictly rising or falling.
        solver: method; `Tsit5()` by default.
        gradient: way to differentiate; by default `Direct()` for at most 200 fixed steps, else `Checkpoint()`.
        rtol: relative tolerance of adaptive steps, at least 0.
        atol: absolute tolerance of adaptive steps, above 0.
        dt: length of fixed steps, above 0.
        grid: times of fixed steps, from the first to the last of `ts`. Where neither is given, a solver without an
            error estimate steps from output to output.
        params: tensors other than the parameters of `field` that it depends on and that want gradients.
        jump_ts: times at which the field jumps; steps meet them exactly.
        adaptive: rule for adaptive steps in place of `rtol` and `atol`.
        per_sample: whether each example of `y0` `[B, ...]` has steps of its own. The field is then called by
            `torch.func.vmap` with the state of one example; explicit adaptive solvers and the gradient `Direct()` only.
        max_steps: maximum number of steps tried, at least 1.

    Shapes:
        y0: any, leaves `[...]`; ys: leaves `[T, ...]`.

    Returns:
        `(ys, stats)`.

    Raises:
        TypeError: if `y0` is no tree of tensors in floating point, or `solver` or `gradient` is no such object.
        ValueError: if times are not monotone, an option is out of range, the field's output has another form, the
            gradient does not fit the solver, or `params` misses a tensor.
        SolveError: if the field is NaN or infinite, or takes too many or too small steps.

    >>> import torch
    >>> ys, stats = odeint(lambda t, y: -y, torch.tensor([1.0]), [0.0, 1.0])
    >>> round(ys[-1].item(), 4)
    0.3679
    """
    solver = _checked_solver(solver or Tsit5(), stochastic=False)
    packing = Packing(y0)
    times = output_times(ts)
    terms = Terms(field, packing, parameters_of(field, params))
    steps, rule = step_grid(times, dt, grid, jump_ts, solver), _checked_adaptive(adaptive or Adaptive(rtol, atol))
    whole("max_steps", max_steps, 1)
    if per_sample:
        jumps = _floats("jump_ts", jump_ts)
        if (
            not isinstance(solver, ExplicitRungeKutta)
            or steps is not None
            or jumps
            or not packing.single
            or not y0.dim()
        ):
            raise ValueError(
                "expected per_sample with adaptive steps of an explicit solver on one tensor, without jumps"
            )
        if not (gradient is None or isinstance(gradient, Direct)):
            raise ValueError(f"expected the gradient Direct() where steps are chosen per sample, got {gradient}")
        return Solution(*solve_each(field, y0, times, solver, rule, max_steps))
    problem = Problem(
        terms, solver, times, steps, rule, jumps=jump_times(jump_ts, times, packing.dtype), max_steps=max_steps
    )
    return solve(problem, packing.pack(y0), gradient)


def sdeint(
    sde: SDE,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    *,
    dt: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    brownian: Brownian | None = None,
    seed: int | None = None,
    params: Iterable[Tensor] = (),
) -> Solution:
    """Solve a stochastic differential equation by fixed steps.

    Args:
        sde: equation; its calculus must be the solver's.
        y0: state at `ts[0]` `[..., h]`.
        ts: times of the outputs `[T]`, at least 2, strictly rising. Between steps outputs lie on straight lines.
        solver: method; by default `ReversibleHeun()` for Stratonovich equations, `Euler()` for Itô ones.
        gradient: way to differentiate; by default `Reversible()` where the solver is reversible, else `Direct()` for at
            most 200 steps and `Checkpoint()` for more.
        dt: length of the steps, above 0.
        grid: times of the steps, in place of `dt`.
        brownian: Brownian motion; a `BrownianGrid` on the steps by default.
        seed: number that decides that default motion; drawn by torch's global generator if None.
        params: tensors other than the parameters of `sde` that it depends on and that want gradients.

    Shapes:
        y0: `[..., h]`; ys: `[T, ..., h]`.

    Returns:
        `(ys, stats)`.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if calculus and solver do not fit, neither `dt` nor `grid` is given, the shape of a diffusion or of
            the Brownian motion does not fit the noise, or the gradient does not fit the solver.
        SolveError: if drift or diffusion is NaN or infinite.
    """
    if not isinstance(sde, SDE):
        raise TypeError(f"expected sde to be an SDE, got {type(sde).__name__}")
    if not isinstance(y0, Tensor) or y0.dim() < 1:
        raise TypeError("expected y0 to be a tensor [..., channels]")
    solver = _checked_solver(solver or (ReversibleHeun() if sde.calculus == "stratonovich" else Euler()), True)
    if solver.calculus != sde.calculus:
        raise ValueError(f"expected a solver for the calculus {sde.calculus!r}, got {solver} for {solver.calculus!r}")
    noises = getattr(solver, "noises", (sde.noise,))
    if sde.noise not in noises:
        raise ValueError(f"expected {' or '.join(noises)} noise for {solver}, got {sde.noise}")
    if dt is None and grid is None:
        raise ValueError("expected dt or grid: stochastic equations are solved by fixed steps")
    packing, times = Packing(y0), output_times(ts)
    if times[0] > times[-1]:
        raise ValueError("expected ts to rise: stochastic equations are solved forwards in time")
    terms = SDETerms(sde, packing, parameters_of(sde, params))
    steps = step_grid(times, dt, grid, (), solver)
    assert steps is not None
    shape = terms.noise_shape(times[0], y0)
    if brownian is None:
        seed = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed)
        # Outputs are on it too, for adjoint equations restart there.
        brownian = BrownianGrid(sorted({*steps, *times}), shape, seed, dtype=y0.dtype, device=y0.device)
    elif not isinstance(brownian, Brownian):
        raise TypeError(f"expected brownian to be a BrownianInterval or BrownianGrid, got {type(brownian).__name__}")
    elif brownian.shape != shape or brownian.dtype != y0.dtype:
        raise ValueError(
            f"expected a Brownian motion of shape {shape} and {y0.dtype}, got {brownian}, {brownian.dtype}"
        )
    problem = Problem(terms, solver, times, steps, noise=brownian)
    if gradient is None and solver.reversible:
        gradient = Reversible()
    return solve(problem, y0, gradient)


def cdeint(
    control: Control,
    field: Callable[..., Any],
    z0: Tensor,
    ts: Tensor | Sequence[float] | None = None,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    dt: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    params: Iterable[Tensor] = (),
    adaptive: Adaptive | None = None,
    max_steps: int = 100_000,
) -> Solution:
    """Solve the controlled differential equation dz = f(t, z) dX(t) as the ordinary one dz/dt = f(t, z) X'(t).

    The control's knots are met exactly where its slope jumps. Gradients reach the data that the control was made from.

    Args:
        control: path X.
        field: function or module `(t, z) -> f` `[..., h, c]`, a matrix for each z.
        z0: state at the first time `[..., h]`; let it depend on the control's first value, since only changes of X are
            seen afterwards.
        ts: times of the outputs `[T]`; both ends of the control by default.
        solver: method; `Tsit5()` by default.
        gradient: way to differentiate; by default `Reversible()` where the solver is reversible, else as for `odeint`.
        rtol: relative tolerance of adaptive steps, at least 0.
        atol: absolute tolerance of adaptive steps, above 0.
        dt: length of fixed steps, above 0.
        grid: times of fixed steps, such as `control.knots`.
        params: tensors other than the parameters of `field` and the control's data that want gradients.
        adaptive: rule for adaptive steps in place of `rtol` and `atol`.
        max_steps: maximum number of steps tried, at least 1.

    Shapes:
        control: values `[..., c]`; z0: `[..., h]`; ys: `[T, ..., h]`.

    Returns:
        `(ys, stats)`.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: as `odeint`, or if times lie outside the control.
        SolveError: as `odeint`.
    """
    if not isinstance(control, Control):
        raise TypeError(f"expected control to be a Control such as HermiteControl, got {type(control).__name__}")
    ts = [control.t0, control.t1] if ts is None else ts
    times = output_times(ts)
    if min(times) < control.t0 or max(times) > control.t1:
        raise ValueError(f"expected ts within the control's times [{control.t0:g}, {control.t1:g}], got {_few(times)}")

    def controlled(t: Tensor, z: Tensor) -> Tensor:
        f, slope = field(t, z), control.derivative(t)
        if f.shape[-1:] != slope.shape[-1:] or f.shape[:-1] != z.shape:
            raise ValueError(
                f"expected the field's output of shape {(*z.shape, slope.shape[-1])}, got {tuple(f.shape)}"
            )
        return (f @ slope.unsqueeze(-1)).squeeze(-1)

    if not isinstance(gradient, Direct):
        refuse_random_layers(field)
    solver = solver or Tsit5()
    if gradient is None and getattr(solver, "reversible", False):
        gradient = Reversible()
    return odeint(
        controlled,
        z0,
        times,
        solver,
        gradient,
        rtol=rtol,
        atol=atol,
        dt=dt,
        grid=grid,
        params=[*parameters_of(field, params), control.coefficients],
        jump_ts=control.jumps,
        adaptive=adaptive,
        max_steps=max_steps,
    )


def solve(problem: Problem, y0: Tensor, gradient: Gradient | None) -> Solution:
    """Run a problem from a packed state."""
    if gradient is None:
        few = problem.grid is not None and len(problem.grid) <= FEW_STEPS
        gradient = Direct() if few else Reversible() if problem.solver.reversible else Checkpoint()
    ys = check_gradient("gradient", gradient).solve(problem, y0)
    packed = ys if isinstance(ys, Tensor) else torch.stack(ys)
    return Solution(problem.terms.packing.unpack(packed), problem.terms.stats)


def parameters_of(field: Any, params: Iterable[Tensor] = ()) -> list[Tensor]:
    """Tensors of a field that want gradients: those named, and the parameters of modules.

    Raises:
        TypeError: if `field` is no function, or one of `params` is no tensor.
    """
    if not callable(field):
        raise TypeError(f"expected field to be a function (t, y) -> dy/dt, got {type(field).__name__}")
    owner = getattr(field, "__self__", field)
    owner = owner.func if isinstance(owner, functools.partial) else owner
    own = owner.parameters() if isinstance(owner, nn.Module) else ()
    unique: dict[int, Tensor] = {}
    for p in itertools.chain(own, params):
        if not isinstance(p, Tensor):
            raise TypeError(f"expected params to be tensors, got {type(p).__name__}")
        if p.requires_grad:
            unique[id(p)] = p
    return list(unique.values())


def _checked_solver(solver: Any, stochastic: bool) -> Solver:
    if not isinstance(solver, Solver):
        raise TypeError(f"expected solver to be a solver such as Tsit5(), got {solver!r}")
    if stochastic and solver.calculus is None:
        raise ValueError(f"expected a solver of stochastic equations such as ReversibleHeun(), got {solver}")
    if not stochastic and not solver.ordinary:
        raise ValueError(f"expected a solver of ordinary equations such as Tsit5(), got {solver}")
    return solver


def _checked_adaptive(adaptive: Adaptive) -> Adaptive:
    at_least("rtol", adaptive.rtol, 0)
    positive("atol", adaptive.atol)
    if adaptive.first_step is not None:
        positive("first_step", adaptive.first_step)
    return adaptive
