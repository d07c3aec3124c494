"""Gradients that cannot be differentiated again, and say so whichever way they are asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_order", "once"]


class _FirstOrder(torch.autograd.Function):
    """Identity on a gradient whose own derivative is refused."""

    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *links: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(ctx.message)


def once(gradient: Tensor, *links: Tensor, what: str = "this gradient") -> Tensor:
    """A gradient whose own derivative raises an error, for every tensor it depends on.

    Args:
        gradient: gradient, computed without a graph.
        links: tensors that it was computed from: ways by which a second derivative would come.
        what: words for it in the error.

    Returns:
        `gradient`, linked to those of `links` that want gradients.
    """
    links = tuple(t for t in links if t.requires_grad)
    if not links:
        return gradient
    out = _FirstOrder.apply(f"{what} cannot be differentiated again", gradient, *links)
    assert isinstance(out, Tensor)
    return out


def first_order(what: str = "this gradient") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function's `backward` that runs without a graph and refuses to be differentiated.

    `torch.autograd.function.once_differentiable` is not enough: `torch.autograd.grad` walks past it and leaves out a
    part of the second derivative without a word.

    Args:
        what: words for the gradient in the error.

    Returns:
        decorator of `backward(ctx, saved, *gradients)`, where `saved` are the saved tensors. A second derivative with
        respect to the incoming gradients or to what a saved tensor depends on raises `RuntimeError`.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def refusing(ctx: Any, *gradients: Any) -> Any:
            saved = ctx.saved_tensors  # once only: checkpointing recomputes them at each access
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            if not torch.is_grad_enabled():  # no graph of the backward pass is wanted
                return results
            links = [t for t in (*gradients, *saved) if isinstance(t, Tensor)]
            single = not isinstance(results, tuple)
            linked = [
                once(r, *links, what=what) if isinstance(r, Tensor) else r for r in ([results] if single else results)
            ]
            return linked[0] if single else tuple(linked)

        return refusing

    return decorate
