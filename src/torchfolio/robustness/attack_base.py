"""What all attacks share: their result, the losses that they raise, the network that they ask, their checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.measure import untouched
from torchfolio.shown import Shown

__all__ = [
    "LOSSES",
    "Attack",
    "Clip",
    "Loss",
    "Norm",
    "attacked",
    "check_inputs",
    "check_logits",
    "finished",
    "lengths",
    "logits_of",
    "margin",
    "objective_of",
    "refuse_nan",
    "wide",
]

Norm = Literal["inf", 2]


Clip = tuple[float, float] | None


Loss = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Attack(Shown):
    """Result of an attack.

    Attributes:
        x_adv: changed inputs, of the shape of `x`.
        success: whether each is classified otherwise than `y` (as the target, of a targeted attack) `[N]`.
        loss: the attack's loss at `x_adv` `[N]`.
        queries: forward passes per sample, of attacks that count them; else 0.
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    queries: int = 0


def margin(logits: Tensor, y: Tensor, cap: float | None = None) -> Tensor:
    """$\\max_{j \\ne y} z_j - z_y$ `[N]`, positive where the prediction is wrong.

    Args:
        logits: `[N, C]`.
        y: labels `[N]`.
        cap: largest value $\\kappa$, so that solved samples are pushed no further; none by default.
    """
    true = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf)
    difference = others.amax(1) - true
    return difference if cap is None else difference.clamp(max=cap)


def _sum_margin(logits: Tensor, y: Tensor) -> Tensor:
    """$\\sum_j (z_j - z_y)$, equal to the margin with two classes."""
    return logits.sum(1) - logits.shape[1] * logits.gather(1, y[:, None])[:, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": lambda z, y: F.cross_entropy(z, y.long(), reduction="none"),
    "margin": margin,
    "sum_margin": _sum_margin,
}
"""Losses that attacks raise, from logits and labels to `[N]`."""


def lengths(x: Tensor) -> Tensor:
    """$L_2$ length of every sample `[N]`, not 0."""
    return x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)


def wide(values: Tensor, x: Tensor) -> Tensor:
    """`[N]` to `[N, 1, ...]`, to go with `x`."""
    return values.view(-1, *[1] * (x.dim() - 1))


@contextmanager
def attacked(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A model in evaluation mode whose parameters want no gradients; all is put back. One that holds NaN is refused."""
    if not isinstance(model, nn.Module):
        yield
        return
    checks.network(model)
    with untouched(model, training=False):
        for p in model.parameters():
            p.requires_grad_(False)
        yield


def objective_of(loss: Loss, targeted: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of logits and labels that an attack raises: the loss, or its negative to reach a target."""
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"expected a loss among {', '.join(LOSSES)} or a function, got {loss!r}")
    if not isinstance(loss, str):
        return (lambda z, y: -loss(z, y)) if targeted else loss
    checked = False

    def objective(logits: Tensor, y: Tensor) -> Tensor:
        nonlocal checked
        if not checked:  # the first ones tell how many classes there are
            check_logits(logits, y)
        checked = True
        return -LOSSES[loss](logits, y) if targeted else LOSSES[loss](logits, y)

    return objective


@torch.no_grad()
def logits_of(model: Callable[[Tensor], Tensor], x: Tensor, max_batch: int) -> Tensor:
    """Logits without gradients, `max_batch` samples at a time."""
    return torch.cat([model(part) for part in x.split(max_batch)])


def finished(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    targeted: bool,
    max_batch: int,
) -> Attack:
    """The result of an attack that arrived at `x`."""
    logits = logits_of(model, x, max_batch)
    wrong = logits.argmax(1) != y
    return Attack(x.detach(), ~wrong if targeted else wrong, objective(logits, y))


def check_inputs(x: Tensor, y: Tensor, clip: Clip, *, eps: float, restarts: int, norm: object) -> None:
    """Raise ValueError on inputs, labels or settings that no attack can take."""
    if not x.is_floating_point() or not len(x):
        raise ValueError(f"expected at least one float input, got {x.dtype} of shape {tuple(x.shape)}")
    if y.shape != (len(x),) or y.is_floating_point():
        raise ValueError(f"expected integer labels [{len(x)}], got {y.dtype} of shape {tuple(y.shape)}")
    checks.labels(y)
    if not bool(x.isfinite().all()):
        raise ValueError("the inputs hold NaN or infinite values")
    if clip is not None and not (clip[0] < clip[1] and float(x.min()) >= clip[0] and float(x.max()) <= clip[1]):
        raise ValueError(f"expected inputs in {clip}, got {float(x.min()):g} to {float(x.max()):g}")
    if not (math.isfinite(eps) and eps >= 0) or restarts < 1 or norm not in ("inf", 2):
        raise ValueError(f"expected eps >= 0, restarts >= 1 and norm 'inf' or 2, got {eps}, {restarts}, {norm!r}")


def check_logits(logits: Tensor, y: Tensor) -> None:
    """Raise ValueError on labels that the logits `[N, C]` do not tell apart, and on NaN, whose class is none."""
    checks.labels(y, logits.shape[1])
    refuse_nan(logits)


def refuse_nan(logits: Tensor) -> None:
    """Raise ValueError on logits that are NaN, whose largest is none."""
    if bool(logits.isnan().any()):
        raise ValueError("the network answers with NaN, which names no class")
