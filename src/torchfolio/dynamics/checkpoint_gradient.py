"""The exact gradient of a solve from states kept along the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import whole
from torchfolio.dynamics.gradient_base import Recomputed, plus
from torchfolio.dynamics.solver import Carry, Step
from torchfolio.dynamics.stepping import Outputs, Problem, march, read_off

__all__ = ["Checkpoint"]


class Checkpoint(Recomputed):
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
        checkpoints: list[tuple[int, Tensor, Carry | None]] = [(0, y0, None)]

        def on_step(step: Step) -> None:
            nonlocal every, checkpoints
            times.append(step.t1)
            n = len(times) - 1
            if n % every == 0:
                checkpoints.append((n, step.y1, step.carry))
            if self.every is None and len(checkpoints) > 2 * every:
                every *= 2
                checkpoints = [entry for entry in checkpoints if entry[0] % every == 0]

        ys = read_off(problem, y0, on_step)
        if checkpoints[-1][0] == len(times) - 1 and len(checkpoints) > 1:
            checkpoints.pop()  # no step begins at the end
        tensors, layout = [], []
        for n, y, carry in checkpoints:
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
            a_params = [plus(p, g) for p, g in zip(a_params, grads, strict=True)]
            end, stop = n, first
        return plus(a_end[0], a[0]), a_params

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


def _first_after(ts: Sequence[float], t: float) -> int:
    direction = ts[-1] - ts[0]
    return next((k for k in range(1, len(ts)) if (ts[k] - t) * direction > 0), len(ts))
