"""Ascent on a loss by gradients: PGD (Madry et al., ICLR 2018) and its single step FGSM (Goodfellow et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.robustness.attack_base import (
    Attack,
    Clip,
    Loss,
    Norm,
    attacked,
    check_inputs,
    finished,
    objective_of,
    wide,
)
from torchfolio.robustness.norm_ball import Ball, Start

__all__ = ["Keep", "fgsm", "pgd"]

Keep = Literal["best", "last", "flipped"]


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float | Tensor,
    steps: int,
    restarts: int = 1,
    norm: Norm = "inf",
    loss: Loss = "margin",
    start: Start = "uniform",
    keep: Keep = "best",
    targeted: bool = False,
    clip: Clip = None,
    max_batch: int = 4096,
    generator: torch.Generator | None = None,
) -> Attack:
    """Projected gradient ascent on a loss within a ball.

    $$x \\leftarrow \\Pi\\bigl(x + \\alpha \\operatorname{sign} \\nabla_x \\ell\\bigr)
    \\quad (L_\\infty), \\qquad x \\leftarrow \\Pi\\bigl(x + \\alpha \\nabla_x \\ell / \\lVert \\nabla_x \\ell \\rVert\\bigr) \\quad (L_2).$$

    Args:
        model: function from inputs to logits `[N, C]`; a module is run in evaluation mode.
        x: inputs `[N, ...]`.
        y: labels `[N]`; with `targeted`, those to reach.
        eps: radius of the ball, at least 0.
        alpha: step size; a tensor `[steps]` gives every step its own.
        steps: number of steps of ascent; 0 is random noise (or the input itself).
        restarts: independent starts, all in one batch.
        norm: norm of the ball: `"inf"` or 2.
        loss: name in `LOSSES`, or a function of logits and labels to `[N]`.
        start: start of the ascent: a uniform point of the ball (and of `clip`), or the input.
        keep: point to return: `"best"`, of the largest loss among all visited, start and end included; `"last"`; or
            `"flipped"`, of the largest margin at least 0 among the points from which a step is taken, else the start (a
            random point): the rule of the SoundnessBench code.
        targeted: whether to reach `y` instead of leaving it.
        clip: range of valid inputs.
        max_batch: maximum number of samples in a forward pass.
        generator: source of the starts.

    Raises:
        ValueError: on shapes that do not fit, NaN, an unknown name or settings out of range.
    """
    check_inputs(x, y, clip, eps=eps, restarts=restarts, norm=norm)
    if start not in ("uniform", "zero") or keep not in ("best", "last", "flipped"):
        raise ValueError(f"expected start uniform or zero, keep best, last or flipped, got {start!r}, {keep!r}")
    objective = objective_of(loss, targeted)
    checks.whole("steps", steps, 0)
    checks.whole("max_batch", max_batch, 1)
    sizes = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    if sizes.shape not in ((), (1,), (steps,)) or not bool((sizes.isfinite() & (sizes >= 0)).all()):
        raise ValueError(f"expected alpha of at least 0, one or one for each of {steps} steps, got {alpha}")
    step_sizes = sizes.expand(steps) if steps else []
    ball = Ball(eps, norm, clip)
    best_x, best = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    size = max(1, max_batch // len(x)) if len(x) < max_batch else 1
    with attacked(model):
        for first in range(0, restarts, size):
            repeats = min(size, restarts - first)
            for rows in torch.arange(len(x), device=x.device).split(max(1, max_batch // repeats)):
                many, labels = x[rows].repeat(repeats, *[1] * (x.dim() - 1)), y[rows].repeat(repeats)
                begun = ball.start(many, start, generator)
                points, value = _ascend(model, many, labels, begun, step_sizes, objective, ball, keep)
                value, which = value.view(repeats, -1).max(0)
                points = points.view(repeats, len(rows), *x.shape[1:])[which, torch.arange(len(rows), device=x.device)]
                better = value > best[rows]
                best[rows] = torch.where(better, value, best[rows])
                best_x[rows] = torch.where(wide(better, points), points, best_x[rows])
        return finished(model, best_x, y, objective, targeted, max_batch)


def _ascend(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    current: Tensor,
    step_sizes: Tensor | list[float],
    objective: Callable[[Tensor, Tensor], Tensor],
    ball: Ball,
    keep: Keep,
) -> tuple[Tensor, Tensor]:
    """Best points and their values, from one start each."""
    bar = 0.0 if keep == "flipped" else -torch.inf
    best_x, best = current.clone(), torch.full((len(x),), bar, dtype=x.dtype, device=x.device)
    for size in step_sizes:
        value, gradient = _gradient(model, current, y, objective)
        best_x, best = _better(best_x, best, current, value, keep)
        current = ball.step(x, current, gradient, float(size))
    if keep == "flipped":
        return best_x, best
    value = _values(model, current, y, objective)
    return (current, value) if keep == "last" else _better(best_x, best, current, value, keep)


def _better(best_x: Tensor, best: Tensor, x: Tensor, value: Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    if keep == "last":
        return best_x, best
    better = value >= best if keep == "flipped" else value > best
    return torch.where(wide(better, x), x, best_x), torch.where(better, value, best)


def _gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, objective: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(model(x), y)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@torch.no_grad()
def _values(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, objective: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    return objective(model(x), y)


def fgsm(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, eps: float, loss: Loss = "ce", clip: Clip = None
) -> Attack:
    """One step of the whole radius from the input itself, $x + \\varepsilon \\operatorname{sign} \\nabla_x \\ell$."""
    return pgd(model, x, y, eps=eps, alpha=eps, steps=1, loss=loss, start="zero", keep="last", clip=clip)
