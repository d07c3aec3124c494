r"""Fixed-step methods for the probability flow of a diffusion model in exponential form, and their gradients.

With $y_t = (\alpha_T / \alpha_t) x_t$ and $\rho_t = \alpha_T \sigma_t / \alpha_t - \sigma_T$ the flow is
$dy/d\rho = \varepsilon_\theta$: its stiff linear part is solved exactly. Everything that a method needs to know of the
schedule is worked out before it begins, in 64 bits, once for all nodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.exponential_methods import (
    METHODS,
    AdamsBashforth2,
    Method,
    Node,
    Plan,
    RungeKutta,
    State,
    make_plan,
)
from torchfolio.engine.first_order import first_order
from torchfolio.shown import Shown

__all__ = [
    "METHODS",
    "AdamsBashforth2",
    "Adjoint",
    "Method",
    "Node",
    "Plan",
    "Problem",
    "RungeKutta",
    "Stats",
    "Symplectic",
    "integrate",
    "make_plan",
]

SUSPECT = 0.1  # reconstruction error above which an adjoint gradient is not to be trusted


@dataclass
class Stats:
    """What a sample and its gradient cost; the figures of the backward pass are filled in by it.

    Attributes:
        nfe_forward: evaluations of the network on the way to the sample.
        nfe_backward: evaluations of the network in the backward pass.
        reconstruction_error: distance of the starting noise from where the adjoint equation came back to, over the
            norm of the noise; `None` until there was a backward pass by the adjoint method.
    """

    nfe_forward: int = 0
    nfe_backward: int = 0
    reconstruction_error: float | None = None


def integrate(
    plan: Plan, slope: Callable[[Node, State], State], y: State, see: Callable[[State], None] | None = None
) -> State:
    """Walk along a plan; `see` is shown the state after every step."""
    before: State | None = None
    for nodes, length, ratio in zip(plan.nodes, plan.lengths, plan.ratios, strict=True):
        y, before = plan.method.step(slope, nodes, length, ratio, y, before)
        if see is not None:
            see(y)
    return y


@dataclass(repr=False)
class Problem(Shown):
    """What the gradient methods solve.

    Attributes:
        drift: `(node, y, cond) -> noise`, differentiable; `cond` is a tensor or `None`.
        forward: plan of the way to the sample.
        backward: plan of the way back.
        params: tensors that the drift depends on and that want gradients.
        stats: counter of evaluations.
        see: function that is called with the state after every step to the sample, if given.
    """

    drift: Callable[[Node, Tensor, Tensor | None], Tensor]
    forward: Plan
    backward: Plan
    params: list[Tensor]
    stats: Stats
    see: Callable[[State], None] | None = None

    def slope(self, cond: Tensor | None) -> Callable[[Node, State], State]:
        """Evaluations on the way to the sample, counted."""

        def slope(node: Node, y: State) -> State:
            self.stats.nfe_forward += 1
            return (self.drift(node, y[0], cond),)

        return slope


class _Sums:
    """Gradients of the condition and the parameters, summed up along the way in 32 bits or more."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.totals = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]

    def add(self, gradients: Sequence[Tensor | None], weight: float = 1.0) -> None:
        pairs = [(total, g) for total, g in zip(self.totals, gradients, strict=True) if g is not None]
        if pairs and weight:
            cast = [g.to(total.dtype) for total, g in pairs]
            torch._foreach_add_([total for total, _ in pairs], cast, alpha=weight)

    def result(self) -> list[Tensor]:
        return [total.to(t.dtype) for total, t in zip(self.totals, self.tensors, strict=True)]


class Adjoint(torch.autograd.Function):
    r"""The continuous adjoint: nothing but the ends of the path is stored.

    Backward $dy/d\rho = \varepsilon$, $da/d\rho = -a^\top \partial_y \varepsilon$ and the same for parameters and
    condition, whose gradients are integrals along the path: weighted sums over the nodes.
    """

    @staticmethod
    def forward(ctx: Any, problem: Problem, y: Tensor, cond: Tensor | None, *params: Tensor) -> Tensor:
        (end,) = integrate(problem.forward, problem.slope(cond), (y,), problem.see)
        ctx.problem = problem
        ctx.save_for_backward(y, end, cond, *params)
        return end

    @staticmethod
    @first_order("the adjoint gradient of a sample")
    def backward(ctx: Any, saved: Sequence[Any], gradient: Tensor) -> tuple[Any, ...]:
        problem: Problem = ctx.problem
        start, end, cond, *params = saved
        wanted, inputs, cond = _wanted(ctx, cond, params)
        sums = _Sums(wanted)

        def slope(node: Node, state: State) -> State:
            problem.stats.nfe_backward += 1
            with torch.enable_grad():
                y = state[0].detach().requires_grad_()
                noise = problem.drift(node, y, cond)
                # Where a node does not count in the sums, only the adjoint itself is needed.
                asked = wanted if node.weight else []
                moved, *others = _vjp([noise], [y, *asked], [-state[1]])
            if asked:
                sums.add(others, node.weight)
            return noise.detach(), torch.zeros_like(y) if moved is None else moved

        y, a = integrate(problem.backward, slope, (end, gradient))
        error = float((y - start).norm() / start.norm())
        problem.stats.reconstruction_error = error
        if not error <= SUSPECT:
            # The same words every time, so that a loop is told once; the figure is in the stats.
            warnings.warn(
                f"going back, the adjoint equation missed the starting noise by more than {SUSPECT:.0%} of its norm "
                "(stats.reconstruction_error), so its gradient is not to be trusted; take more steps, a higher order, "
                "grid='logsnr' or grad='symplectic'",
                stacklevel=2,
            )
        return (None, a, *inputs(sums.result()))


class Symplectic(torch.autograd.Function):
    """The exact gradient of the discrete steps: states are stored, and one step at a time is evaluated again."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, y: Tensor, cond: Tensor | None, *params: Tensor) -> Tensor:
        states = [y]

        def see(state: State) -> None:
            states.append(state[0])
            if problem.see is not None:
                problem.see(state)

        (end,) = integrate(problem.forward, problem.slope(cond), (y,), see)
        ctx.problem = problem
        ctx.save_for_backward(cond, *params, *states[:-1])
        return end

    @staticmethod
    @first_order("the symplectic gradient of a sample")
    def backward(ctx: Any, saved: Sequence[Any], gradient: Tensor) -> tuple[Any, ...]:
        problem: Problem = ctx.problem
        plan, count = problem.forward, len(problem.params)
        cond, *saved = saved
        wanted, inputs, cond = _wanted(ctx, cond, saved[:count])
        states, sums = saved[count:], _Sums(wanted)

        def slope(node: Node, y: State) -> State:
            problem.stats.nfe_backward += 1
            return (problem.drift(node, y[0], cond),)

        a, later = gradient, None
        for k in reversed(range(len(states))):
            with torch.enable_grad():
                y = states[k].detach().requires_grad_()
                # A step is linear in the slope that it is handed, so that its value does not matter for the gradient.
                before = torch.zeros_like(y, requires_grad=True) if plan.method.multistep and k else None
                (reached,), now = plan.method.step(
                    slope, plan.nodes[k], plan.lengths[k], plan.ratios[k], (y,), None if before is None else (before,)
                )
                outputs, cotangents = [reached], [a]
                if now is not None and later is not None:
                    outputs, cotangents = [reached, now[0]], [a, later]
                leaves = [y] if before is None else [y, before]
                gradients = _vjp(outputs, [*leaves, *wanted], cotangents)
            assert gradients[0] is not None
            a, later = gradients[0], None if before is None else gradients[1]
            sums.add(gradients[len(leaves) :])
        return (None, a, *inputs(sums.result()))


def _wanted(
    ctx: Any, cond: Tensor | None, params: Sequence[Tensor]
) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor | None]], Tensor | None]:
    """The tensors that want gradients, and how their gradients become those of all inputs after the state."""
    if cond is not None and ctx.needs_input_grad[2]:
        cond = cond.detach().requires_grad_()
    tensors = [cond, *params]
    needed = ctx.needs_input_grad[2:]
    wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None]

    def inputs(gradients: list[Tensor]) -> list[Tensor | None]:
        rest = iter(gradients)
        return [next(rest) if need else None for need in needed]

    return wanted, inputs, cond


def _vjp(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor | None]:
    """Vector-Jacobian products, `None` where nothing depends on an input."""
    pairs = [(out, v) for out, v in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outs, vs = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outs, inputs, vs, allow_unused=True))
