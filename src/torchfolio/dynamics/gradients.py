"""Ways to differentiate a solve: through the solver, from checkpoints, by reversing it, by the adjoint equation."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from torchfolio.checks import whole
from torchfolio.dynamics.reversible_heun import ReversibleHeun
from torchfolio.dynamics.runge_kutta import ExplicitRungeKutta
from torchfolio.dynamics.solver import Carry, Solver, Step
from torchfolio.dynamics.stepping import Adaptive, Outputs, Problem, march, read_off, rms
from torchfolio.engine.first_order import first_order
from torchfolio.shown import Shown

__all__ = ["Adjoint", "Checkpoint", "Direct", "Gradient", "Reversible", "check_gradient", "refuse_random_layers"]

RETURN = 1e-3  # how far off the way back may end, relative to the largest state


class Gradient(Shown, ABC):
    """A way to differentiate a solve in its first state and its parameters."""

    @abstractmethod
    def solve(self, problem: Problem, y0: Tensor) -> list[Tensor] | Tensor:
        """States at the times asked for, as autograd sees them."""


class Direct(Gradient):
    """Backpropagation through the steps of the solver: the exact gradient, at memory that grows with the steps."""

    def solve(self, problem: Problem, y0: Tensor) -> list[Tensor] | Tensor:
        return read_off(problem, y0)

    def __repr__(self) -> str:
        return "Direct()"


class _Recomputed(Gradient):
    """A gradient that keeps little in the forward pass and computes again in the backward pass."""

    def check(self, problem: Problem, y0: Tensor) -> None:
        """Refuse a problem that it cannot differentiate.

        Raises:
            ValueError: if it is one.
        """
        refuse_random_layers(problem.terms.field)

    def solve(self, problem: Problem, y0: Tensor) -> list[Tensor] | Tensor:
        terms = problem.terms
        if not torch.is_grad_enabled() or not any(v.requires_grad for v in (y0, *terms.params)):
            return read_off(problem, y0)
        self.check(problem, y0)
        terms.params = _used_parameters(problem, y0)
        return _Solve.apply(self, problem, y0, *terms.params)  # pyright: ignore[reportReturnType]

    @abstractmethod
    def forward(self, problem: Problem, y0: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
        """Outputs, tensors to keep, and anything else to keep."""

    @abstractmethod
    def backward(
        self, problem: Problem, ys: Tensor, kept: Sequence[Tensor], rest: Any, a: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients in the first state and in the parameters from those in the outputs."""


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: _Recomputed, problem: Problem, y0: Tensor, *params: Tensor) -> Tensor:
        ys, kept, ctx.rest = mode.forward(problem, y0.detach())
        ctx.mode, ctx.problem, ctx.n_params = mode, problem, len(params)
        out = torch.stack(ys)
        # Parameters are saved so that autograd notices where they were changed in between.
        ctx.save_for_backward(*params, out if isinstance(mode, Adjoint) else y0, *kept)
        return out

    @staticmethod
    @first_order("the gradient of a solve, except through Direct(),")
    def backward(ctx: Any, saved: Sequence[Tensor], a: Tensor) -> tuple[Any, ...]:
        problem, n = ctx.problem, ctx.n_params
        problem.terms.backward = True
        try:
            a_y, a_params = ctx.mode.backward(problem, saved[n], saved[n + 1 :], ctx.rest, a)
        finally:
            problem.terms.backward = False
        return (None, None, a_y, *a_params)


class Checkpoint(_Recomputed):
    """The exact gradient from states kept along the way: steps are taken again, a few at a time.

    Args:
        every: number of steps between states that are kept, at least 1; 1 keeps every state and the graph of a single
            step. If None, about the square root of the number of steps, however many there will be.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = None if every is None else whole("every", every, 1)

    def forward(self, problem: Problem, y0: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
        every = self.every or 1
        times = [problem.ts[0]]
        kept: list[tuple[int, Tensor, Carry | None]] = [(0, y0, None)]

        def on_step(step: Step) -> None:
            nonlocal every, kept
            times.append(step.t1)
            n = len(times) - 1
            if n % every == 0:
                kept.append((n, step.y1, step.carry))
            if self.every is None and len(kept) > 2 * every:
                every *= 2
                kept = [entry for entry in kept if entry[0] % every == 0]

        ys = read_off(problem, y0, on_step)
        if kept[-1][0] == len(times) - 1 and len(kept) > 1:
            kept.pop()  # no step begins at the end
        tensors, layout = [], []
        for n, y, carry in kept:
            layout.append((n, None if carry is None else len(carry)))
            tensors += [y, *(carry or ())]
        return ys, tensors[1:], (times, layout)

    def backward(
        self, problem: Problem, ys: Tensor, kept: Sequence[Tensor], rest: Any, a: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        times, layout = rest
        tensors, segments, end = [ys, *kept], [], len(times) - 1
        for n, size in layout:
            y, *carry = tensors[: 1 + (size or 0)]
            tensors = tensors[1 + (size or 0) :]
            segments.append((n, y, None if size is None else tuple(carry)))
        a_params: list[Any] = [None] * len(problem.terms.params)
        a_end: list[Tensor | None] = [None]
        stop = len(problem.ts)
        for n, y, carry in reversed(segments):
            first = _first_after(problem.ts, times[n])
            a_out = a[first:stop]
            a_end, grads = _through(problem, y, carry, times[n : end + 1], first, a_out, a_end)
            a_params = [_plus(p, g) for p, g in zip(a_params, grads, strict=True)]
            end, stop = n, first
        return _plus(a_end[0], a[0]), a_params

    def __repr__(self) -> str:
        return f"Checkpoint({'' if self.every is None else self.every})"


def _through(
    problem: Problem,
    y: Tensor,
    carry: Carry | None,
    grid: Sequence[float],
    first: int,
    a_out: Tensor,
    a_end: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Take the steps of a segment again, and gradients through them."""
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in (y, *(carry or ()))]
        outputs, targets, weights = Outputs(problem, first), [], []
        step = None
        for step in march(problem, leaves[0], None if carry is None else tuple(leaves[1:]), grid):
            targets += outputs.of(step)
        weights += list(a_out)
        assert step is not None
        for target, weight in zip((step.y1, *step.carry), a_end, strict=False):
            if weight is not None:
                targets.append(target)
                weights.append(weight)
        pairs = [(v, w) for v, w in zip(targets, weights, strict=True) if v.requires_grad]
    inputs = (*leaves, *problem.terms.params)
    if not pairs:
        return [None] * len(leaves), [None] * len(problem.terms.params)
    targets, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(targets, inputs, weights, allow_unused=True)
    return list(grads[: len(leaves)]), list(grads[len(leaves) :])


class Reversible(_Recomputed):
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
        times, kept, ends = [problem.ts[0]], [], []
        jumps, end = problem.jumps, problem.ts[-1]

        def on_step(step: Step) -> None:
            times.append(step.t1)
            if step.t1 == end or step.t1 in jumps:
                ends.append(len(times) - 1)
                kept.extend((step.y1, step.carry[0]))

        return read_off(problem, y0, on_step), kept, (times, ends)

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
                cotangents = (_plus(cotangents[0], to_y1), *cotangents[1:])
                y, z, at, cotangents, grads = solver.reverse(terms, *problem.sides(t0, t1), noise, y, z, at, cotangents)
                cotangents = (_plus(cotangents[0], to_y0), *cotangents[1:])
                a_params = [_plus(p, g) for p, g in zip(a_params, grads, strict=True)]
            _check_return(y, [ys, *kept[::2]], j)
            # The piece began with z = y and the rates there.
            back, grads = at.pull(cotangents[2:])
            a_params = [_plus(p, g) for p, g in zip(a_params, grads, strict=True)]
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
        to_y1 = _plus(to_y1, a[k] * x)
        to_y0 = _plus(to_y0, a[k] * (1 - x)) if x != 1 else to_y0
        k -= 1
    return to_y1, to_y0, k


class Adjoint(_Recomputed):
    """The continuous adjoint: an equation for the gradient, solved backwards in time together with the state.

        da/dt = -aᵀ ∂f/∂y,    dG/dt = -aᵀ ∂f/∂θ

    Memory does not grow with the steps, but the gradient is that of the exact solution, not of the computed one: it is
    as wrong as both solves' tolerances allow.

    Args:
        solver: solver of the adjoint equation; the same as forwards if None. For stochastic equations `Heun()`,
            `Midpoint()` or `Ralston()`.
        rtol: relative tolerance of the adjoint equation; as forwards if None.
        atol: absolute tolerance of the adjoint equation; as forwards if None.
        seminorm: whether the gradients G of the parameters, on which nothing depends, are left out of the error norm;
            fewer steps are rejected then.

    Reference:
        Chen et al., arXiv 1806.07366; Kidger, Chen, Lyons, arXiv 2009.09457 (the seminorm).
    """

    def __init__(
        self,
        solver: Solver | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        seminorm: bool = True,
    ) -> None:
        self.solver, self.rtol, self.atol, self.seminorm = solver, rtol, atol, seminorm

    def check(self, problem: Problem, y0: Tensor) -> None:
        solver = self.solver or problem.solver
        if problem.terms.noisy and not (isinstance(solver, ExplicitRungeKutta) and solver.calculus == "stratonovich"):
            raise ValueError(
                f"expected Heun() or Midpoint() to solve the adjoint of a stochastic equation, got {solver}"
            )
        if solver.implicit:
            raise ValueError(f"expected an explicit solver of the adjoint equation, got {solver}; or use Checkpoint()")
        super().check(problem, y0)

    def forward(self, problem: Problem, y0: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
        return read_off(problem, y0), [], None

    def backward(
        self, problem: Problem, ys: Tensor, kept: Sequence[Tensor], rest: Any, a: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        terms, n = problem.terms.adjoint(), ys[0].numel()
        given = problem.adaptive

        def seminorm(x: Tensor) -> Tensor:
            # Measured apart, the state and its gradient are each held to the tolerance, however many parameters.
            return torch.maximum(rms(x[:n]), rms(x[n : 2 * n]))

        def norm(x: Tensor) -> Tensor:
            return torch.maximum(seminorm(x), rms(x[2 * n :])) if x.numel() > 2 * n else seminorm(x)

        adaptive = Adaptive(
            given.rtol if self.rtol is None else self.rtol,
            given.atol if self.atol is None else self.atol,
            given.pi,
            seminorm if self.seminorm else norm,
        )
        back = replace(problem, terms=terms, solver=self.solver or problem.solver, adaptive=adaptive, last_step=None)
        state = torch.cat([ys[-1].reshape(-1), a[-1].reshape(-1), ys.new_zeros(terms.n_params)])
        for k in range(len(problem.ts) - 1, 0, -1):
            t1, t0 = problem.ts[k], problem.ts[k - 1]
            inner = None if problem.grid is None else _between(problem.grid, t0, t1)
            grid = None if inner is None else [t1, *reversed(inner), t0]
            jumps = dict.fromkeys(reversed(_between(problem.jumps, t0, t1, ends=True)))
            back = replace(back, ts=(t1, t0), grid=grid, jumps=jumps, last_step=back.last_step)
            with torch.no_grad():
                state = read_off(back, state)[-1]
            # The state is known at every output, and outputs add to the gradient.
            y = ys[k - 1].reshape(-1)
            state = torch.cat([y, state[n : 2 * n] + a[k - 1].reshape(-1), state[2 * n :]])
        parts = state[2 * n :].split([p.numel() for p in problem.terms.params])
        grads = [part.view_as(p).to(p.dtype) for part, p in zip(parts, problem.terms.params, strict=True)]
        return state[n : 2 * n].view_as(ys[0]), grads

    def __repr__(self) -> str:
        given = {"solver": self.solver, "rtol": self.rtol, "atol": self.atol}
        text = [f"{name}={value}" for name, value in given.items() if value is not None]
        return f"Adjoint({', '.join(text + ([] if self.seminorm else ['seminorm=False']))})"


def _between(times: Iterable[float], t0: float, t1: float, ends: bool = False) -> list[float]:
    low, high = min(t0, t1), max(t0, t1)
    return [t for t in times if low < t < high or (ends and t in (low, high))]


def _first_after(ts: Sequence[float], t: float) -> int:
    direction = ts[-1] - ts[0]
    return next((k for k in range(1, len(ts)) if (ts[k] - t) * direction > 0), len(ts))


def _plus(x: Any, y: Tensor | None) -> Any:
    """Sum, where None is nothing."""
    return y if x is None else x if y is None else x + y


def refuse_random_layers(field: Any) -> None:
    """Refuse a module that answers at random, or counts its calls, where it will be asked again.

    Raises:
        ValueError: if dropout or batch normalisation is in training mode.
    """
    modules = field.modules() if isinstance(field, nn.Module) else ()
    for module in modules:
        if module.training and isinstance(module, (_DropoutNd, _BatchNorm)):
            raise ValueError(
                f"expected a field that answers alike each time, got {type(module).__name__} in training mode; "
                "use the gradient Direct() or call eval()"
            )


def _used_parameters(problem: Problem, y0: Tensor) -> tuple[Tensor, ...]:
    """Parameters that the field depends on directly.

    Raises:
        ValueError: if it depends on other tensors that want gradients, or a parameter was computed from another one that
            the field depends on too, whose gradient would count twice.
    """
    terms = problem.terms
    before = terms.stats.nfe_forward
    with torch.enable_grad():
        # As in a solve, the state wants a gradient: fields such as those of flows differentiate in it themselves.
        state = y0.detach().requires_grad_()
        outputs = terms.rates(problem.sides(problem.ts[0], problem.ts[-1])[0], state)
    terms.stats.nfe_forward = before
    # Parameters by the node of the graph that stands for them: leaves by their own, computed ones by what computed them.
    declared = {id(p) if p.grad_fn is None else p.grad_fn: p for p in terms.params}
    used, missing = _reached([out.grad_fn for out in outputs], {**declared, id(state): state})
    used = [key for key in used if key != id(state)]
    if missing:
        raise ValueError(
            f"expected params to name every tensor that the field depends on and that wants a gradient, "
            f"one of shape {tuple(missing[0].shape)} is missing"
        )
    computed = [node for key in used if (node := declared[key].grad_fn) is not None]
    behind, _ = _reached([parent for node in computed for parent, _ in node.next_functions], declared)
    if twice := [declared[key] for key in used if key in behind]:
        raise ValueError(
            f"expected params of which none was computed from another, one of shape {tuple(twice[0].shape)} was used so; "
            "hand the field one of the two detached, or use the gradient Direct()"
        )
    return tuple(declared[key] for key in used)


def _reached(nodes: list[Any], declared: Mapping[Any, Tensor]) -> tuple[list[Any], list[Tensor]]:
    """Keys of declared tensors that a graph reaches without passing through one, and leaves that are not declared."""
    seen, used, missing = set(), [], []
    nodes = [node for node in nodes if node is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        key = node if variable is None else id(variable)
        if key in declared:
            used.append(key)
        elif variable is not None:
            missing.append(variable)
        else:
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return used, missing


def check_gradient(name: str, value: Any) -> Gradient:
    """Refuse what is no gradient.

    Raises:
        TypeError: if it is none; objects are wanted, not their names or classes.
    """
    if not isinstance(value, Gradient):
        raise TypeError(f"expected {name} to be a gradient such as Direct() or Adjoint(), got {value!r}")
    return value
