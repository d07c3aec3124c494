"""The way from inputs to a network's boundary between two classes: gradients there, and minimal L2 moves.

The moves are those of DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016) between two given classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.models.features import take_features
from torchfolio.robustness.attack_base import attacked

OVERSHOOT = 0.02  # by which the boundary is crossed, so that a step need not be exact


@dataclass(frozen=True)
class Ways:
    """What `distances_and_gradients` found.

    Attributes:
        points: inputs, or features of a layer, `[N, ...]`.
        margin: $z_b - z_a$ at the points, `[N]`.
        gradient: gradient of the margin at the points, `[N, ...]`.
        move: function from the points to the boundary, `[N, ...]`.
        reached: whether the boundary was reached, `[N]`.
    """

    points: Tensor
    margin: Tensor
    gradient: Tensor
    move: Tensor
    reached: Tensor


def distances_and_gradients(
    model: nn.Module, x: Tensor, pair: tuple[int, int], *, layer: str | None, steps: int, batch_size: int
) -> Ways:
    """For all inputs, a batch at a time: the margin of two classes, its gradient, and the move to the boundary.

    $$x \\leftarrow x - \\frac{m(x)}{\\lVert \\nabla m \\rVert^2} \\nabla m, \\qquad m = z_b - z_a,$$

    each step 1.02 times as long, until the sign of m changes. The move is the sum of the steps at their own length: exact
    for a linear network.

    Args:
        model: network; in evaluation mode, its parameters get no gradients.
        x: inputs `[N, ...]`.
        pair: outputs a and b.
        layer: dotted name of the module whose output takes the place of the input.
        steps: maximum number of steps, at least 1.
        batch_size: inputs at a time.
    """
    whole("steps", steps, 1)
    like = next(model.parameters(), x)
    parts = []
    with attacked(model):
        for batch in x.to(like.device).split(whole("batch_size", batch_size, 1)):
            batch = batch.to(like.dtype) if batch.is_floating_point() else batch
            with _from_layer(model, batch, layer) as (start, logits):
                parts.append(_walk(start, _margin(logits, pair), steps))
    return Ways(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@contextmanager
def _from_layer(model: nn.Module, x: Tensor, layer: str | None) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Where the walk starts, and the network from there on."""
    if layer is None:
        yield x.detach(), model
        return
    with torch.no_grad(), take_features(model, layer, detach=True) as features:
        model(x)
        start = features[layer]
    module, inputs = model.get_submodule(layer), {}
    handle = module.register_forward_hook(lambda *call: inputs["h"])

    def rest(h: Tensor) -> Tensor:
        inputs["h"] = h
        return model(x)

    try:
        yield start, rest
    finally:
        handle.remove()


def _margin(logits: Callable[[Tensor], Tensor], pair: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    a, b = pair

    def margin(h: Tensor) -> Tensor:
        z = logits(h)
        if z.dim() != 2 or max(a, b) >= z.shape[1]:
            raise ValueError(f"expected a network with outputs {a} and {b} [N, C], got shape {tuple(z.shape)}")
        return z[:, b] - z[:, a]

    return margin


def _walk(start: Tensor, margin: Callable[[Tensor], Tensor], steps: int) -> tuple[Tensor, ...]:
    """All points at once; those that have crossed wait for the others."""
    move = torch.zeros_like(start)
    value, gradient = _with_gradient(margin, start)
    first, slope, current = value, gradient, start
    crossed = value == 0
    for _ in range(steps):
        square = gradient.flatten(1).square().sum(1)
        going = ~crossed & (square > 0)
        if not going.any():
            break
        factor = torch.where(going, -value / square.clamp(min=torch.finfo(square.dtype).tiny), 0)
        move = move + factor.view(-1, *[1] * (start.dim() - 1)) * gradient
        current = start + (1 + OVERSHOOT) * move
        value, gradient = _with_gradient(margin, current)
        crossed = crossed | (value.sign() != first.sign())
    return start, first, slope, move, crossed


def _with_gradient(margin: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        value = margin(h)
        (gradient,) = torch.autograd.grad(value.sum(), h)
    return value.detach(), gradient
