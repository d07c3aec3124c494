"""The base of ways to differentiate a solve, and the plain one: backpropagation through the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.dynamics.stepping import Problem, read_off
from torchfolio.dynamics.used_parameters import refuse_random_layers, used_parameters
from torchfolio.engine.first_order import first_order
from torchfolio.shown import Shown

__all__ = ["Direct", "Gradient", "Recomputed", "check_gradient", "plus"]


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


class Recomputed(Gradient):
    """A gradient that keeps little in the forward pass and computes again in the backward pass.

    Attributes:
        keeps_outputs: whether `backward` is handed all outputs instead of the first state.
    """

    keeps_outputs = False

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
        terms.params = used_parameters(problem, y0)
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
    def forward(ctx: Any, mode: Recomputed, problem: Problem, y0: Tensor, *params: Tensor) -> Tensor:
        ys, kept, ctx.rest = mode.forward(problem, y0.detach())
        ctx.mode, ctx.problem, ctx.n_params = mode, problem, len(params)
        out = torch.stack(ys)
        # Parameters are saved so that autograd notices where they were changed in between.
        ctx.save_for_backward(*params, out if mode.keeps_outputs else y0, *kept)
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


def plus(x: Any, y: Tensor | None) -> Any:
    """Sum, where None is nothing."""
    return y if x is None else x if y is None else x + y


def check_gradient(name: str, value: Any) -> Gradient:
    """Refuse what is no gradient.

    Raises:
        TypeError: if it is none; objects are wanted, not their names or classes.
    """
    if not isinstance(value, Gradient):
        raise TypeError(f"expected {name} to be a gradient such as Direct() or Adjoint(), got {value!r}")
    return value
