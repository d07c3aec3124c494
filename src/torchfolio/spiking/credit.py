"""How a linear or convolution layer goes backward, changed from outside: other activity, other weights, a projection.

Online rules take traces of spikes in place of the spikes, feedback alignment takes other weights to send errors down,
orthogonal projection takes a part of the activity. All of them change the same two products of a layer's backward pass,
so they go through one hook of the layer and combine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from torchfolio.shown import Shown

__all__ = ["Credit", "WeightLayer", "credit_of", "fan_in", "rows_of", "weight_layers"]

WeightLayer = nn.Linear | nn.Conv2d
"""Layers whose weights are trained step by step."""


def weight_layers(model: nn.Module) -> dict[str, WeightLayer]:
    """The linear and ungrouped convolution layers of a network by name, each once."""
    named = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {n: m for n, m in named.items() if isinstance(m, nn.Linear) or m.groups == 1}


def fan_in(layer: WeightLayer) -> int:
    """Number of inputs n of one unit: features, or C k k of a patch."""
    return layer.weight[0].numel()


def rows_of(layer: WeightLayer, x: Tensor) -> Tensor:
    """What the layer's weights meet: examples `[B, n]`, for a convolution all patches `[B L, n]`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    return _patches(layer, x).transpose(1, 2).flatten(0, 1)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    x, padding = _padded(layer, x)
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # pyright: ignore


def _padded(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Any]:
    """The input, and the zero padding that is still to come; other padding (`"same"`, reflected) is done here."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode), 0


class Credit(Shown):
    """The backward pass of one layer. What is `None` stays as usual.

    Attributes:
        activity: function from the layer's input to what the weight's gradient sees in its place; called at every
            forward pass.
        project: function from rows `[..., n]` to what is left of them in the weight's gradient.
        transport: weights that send errors down in place of the layer's own, of their shape.
        record: function that is called with input and activity at every forward pass.
    """

    def __init__(self, layer: WeightLayer) -> None:
        self.activity: Callable[[Tensor], Tensor] | None = None
        self.project: Callable[[Tensor], Tensor] | None = None
        self.transport: Tensor | None = None
        self.record: Callable[[Tensor, Tensor], None] | None = None
        self._handle = layer.register_forward_hook(self)

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        with torch.no_grad():
            activity = x if self.activity is None else self.activity(x)
            if self.record is not None:
                self.record(x.detach(), activity.detach())
        usual = self.activity is None and self.project is None and self.transport is None
        if usual or not output.requires_grad:
            return None
        return _Layer.apply(x, layer.weight, layer.bias, output.detach(), activity, layer, self)  # pyright: ignore

    def release(self) -> None:
        """Take the hook off the layer if nothing is changed any more."""
        if self.activity is self.project is self.transport is self.record is None:
            self._handle.remove()


_CREDITS: WeakKeyDictionary[nn.Module, Credit] = WeakKeyDictionary()


def credit_of(layer: WeightLayer) -> Credit:
    """The one hook of a layer; made where there is none yet. Set what you change, put it back, and `release`."""
    credit = _CREDITS.get(layer)
    if credit is None or credit not in layer._forward_hooks.values():
        credit = _CREDITS[layer] = Credit(layer)
    return credit


class _Layer(torch.autograd.Function):
    """A layer that has run already, with another backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
        activity: Tensor,
        layer: Any,
        credit: Any,
    ) -> Tensor:
        ctx.save_for_backward(weight, activity)
        ctx.layer, ctx.shape, ctx.project, ctx.transport = layer, x.shape, credit.project, credit.transport
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,), (weight, activity) = gradients, ctx.saved_tensors
        layer, linear = ctx.layer, isinstance(ctx.layer, nn.Linear)
        down, own, bias = None, None, None
        if ctx.needs_input_grad[0]:
            sent = (weight if ctx.transport is None else ctx.transport).to(g.dtype)
            down = g @ sent if linear else _sent_down(layer, ctx.shape, sent, g)
        if ctx.needs_input_grad[1]:
            own = _weight_gradient(layer, activity.to(g.dtype), g, ctx.project).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            bias = g.flatten(0, -2).sum(0) if linear else g.sum((0, 2, 3))
        return down, own, bias, None, None, None, None


def _sent_down(layer: Any, shape: torch.Size, sent: Tensor, g: Tensor) -> Tensor:
    with torch.enable_grad():
        x = g.new_zeros(shape, requires_grad=True)
        padded, padding = _padded(layer, x)
    down = conv2d_input(padded.shape, sent, g, layer.stride, padding, layer.dilation)
    return down if padded is x else torch.autograd.grad(padded, x, down)[0]  # padding is linear


def _weight_gradient(layer: Any, activity: Tensor, g: Tensor, project: Callable[[Tensor], Tensor] | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        rows = rows_of(layer, activity)
        return g.reshape(-1, g.shape[-1]).mT @ (rows if project is None else project(rows))
    if project is None:
        padded, padding = _padded(layer, activity)
        return conv2d_weight(padded, layer.weight.shape, g, layer.stride, padding, layer.dilation)
    rows = project(_patches(layer, activity).mT)
    return (g.flatten(2) @ rows).sum(0).view_as(layer.weight)
