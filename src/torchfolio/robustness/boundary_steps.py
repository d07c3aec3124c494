"""Steps to the nearest boundary of the linearised network: DeepFool (Moosavi-Dezfooli et al., CVPR 2016)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from torchfolio.robustness.attack_base import (
    Attack,
    Clip,
    attacked,
    check_inputs,
    check_logits,
    finished,
    lengths,
    margin,
    wide,
)

__all__ = ["deepfool"]


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int | Literal["all"] = 2,
    clip: Clip = None,
) -> Attack:
    """A small $L_2$ perturbation, by steps to the nearest boundary of the linearised model.

    With two classes $x \\leftarrow x - (1 + \\text{overshoot})\\, \\frac{m}{\\lVert g \\rVert^2}\\, g$ for the margin $m$ of the
    label and its gradient $g$: exact in one step for a linear model.

    Args:
        model: module from inputs to logits.
        x: inputs `[N, ...]`.
        y: labels `[N]`; the model's own by default.
        steps: maximum number of steps.
        overshoot: share of a step by which the boundary is crossed.
        classes: number of the likeliest classes that are looked at, at least 2, or `"all"`.
        clip: range of valid inputs.
    """
    with attacked(model):
        check_inputs(x, torch.zeros(len(x), dtype=torch.long) if y is None else y, clip, eps=0.0, restarts=1, norm=2)
        with torch.no_grad():
            logits = model(x)
        labels = logits.argmax(1) if y is None else y
        check_logits(logits, labels)
        count = logits.shape[1] if classes == "all" else min(int(classes), logits.shape[1])
        if count < 2:
            raise ValueError(f"expected at least two classes, got {classes!r}")
        likely = logits.scatter(1, labels[:, None], torch.inf).topk(count, 1).indices[:, 1:]
        current = x.clone()
        for _ in range(steps):
            with torch.no_grad():
                rest = (margin(model(current), labels) <= 0).nonzero()[:, 0]
            if not len(rest):
                break
            move = _to_boundary(model, current[rest], labels[rest], likely[rest])
            moved = current[rest] + (1 + overshoot) * move
            current[rest] = moved if clip is None else moved.clamp(*clip)
        return finished(model, current, labels, margin, False, max(1, len(x)))


def _to_boundary(model: nn.Module, x: Tensor, y: Tensor, others: Tensor) -> Tensor:
    """The shortest move to a boundary with one of the other classes, of the linearised model."""
    best, move = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device), torch.zeros_like(x)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        true = logits.gather(1, y[:, None])[:, 0]
        for k in range(others.shape[1]):
            gap = logits.gather(1, others[:, k : k + 1])[:, 0] - true
            (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
            length = lengths(gradient)
            distance = gap.detach().abs() / length
            # A point on the boundary must still be moved off it.
            step = wide((distance + 1e-6 * (distance == 0)) / length, x) * gradient
            nearer = distance < best
            best, move = torch.where(nearer, distance, best), torch.where(wide(nearer, x), step, move)
    return move
