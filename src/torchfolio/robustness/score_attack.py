"""Ascent on gradients that are estimated from logits: NES (Ilyas et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchfolio.robustness.attack_base import (
    Attack,
    Clip,
    Loss,
    attacked,
    check_inputs,
    check_logits,
    finished,
    logits_of,
    margin,
    objective_of,
    wide,
)
from torchfolio.robustness.norm_ball import Ball

__all__ = ["nes"]


def nes(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step: float,
    steps: int,
    samples: int = 20,
    sigma: float = 0.01,
    stop: float = 0.5,
    loss: Loss = "margin",
    clip: Clip = None,
    max_batch: int = 4096,
    generator: torch.Generator | None = None,
) -> Attack:
    """Ascent on an estimated gradient, for models that give logits and no gradients.

    $$g = \\frac{1}{n} \\sum_{i} \\bigl(\\ell(x + \\sigma u_i) - \\ell(x - \\sigma u_i)\\bigr) u_i, \\qquad
    x \\leftarrow \\Pi(x + \\text{step} \\cdot \\operatorname{sign} g).$$

    Args:
        model: function from inputs to logits.
        x: inputs `[N, ...]`.
        y: labels `[N]`.
        eps: $L_\\infty$ radius.
        step: step size.
        steps: maximum number of steps; a sample rests once its margin exceeds `stop`.
        samples: number $n$ of pairs of evaluations a step.
        sigma: distance $\\sigma$ of the evaluations from the point.
        stop: margin at which a sample rests.
        loss: loss that is raised, see `pgd`.
        clip: range of valid inputs.
        max_batch: maximum number of samples in a forward pass.
        generator: source of the directions.

    Returns:
        With `queries`, $2 n$ for every step that any sample took.
    """
    check_inputs(x, y, clip, eps=eps, restarts=1, norm="inf")
    objective, ball = objective_of(loss, False), Ball(eps, "inf", clip)
    current, queries = x.clone(), 0
    with attacked(model), torch.no_grad():
        for _ in range(steps):
            logits = logits_of(model, current, max_batch)
            check_logits(logits, y)
            going = margin(logits, y) <= stop
            if not going.any():
                break
            queries += 2 * samples
            gradient = torch.zeros_like(current[going])
            source = x.device if generator is None else generator.device
            for _ in range(samples):
                u = torch.randn(gradient.shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
                ends = (logits_of(model, current[going] + sign * sigma * u, max_batch) for sign in (1, -1))
                up, down = (objective(z, y[going]) for z in ends)
                gradient += wide(up - down, u) * u / samples
            current[going] = ball.step(x[going], current[going], gradient, step)
        done = finished(model, current, y, objective, False, max_batch)
    return Attack(done.x_adv, done.success, done.loss, queries)
