"""Interval bound propagation (Gowal et al., 2018): cheap, loose, differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.robustness.activation_lines import ACTIVATIONS
from torchfolio.robustness.affine_layers import Affine
from torchfolio.robustness.layer_list import Layers, Mark
from torchfolio.robustness.pooling_bounds import MaxPool
from torchfolio.robustness.properties import Box, Property
from torchfolio.shown import Shown

__all__ = ["Bounds", "Range", "ibp", "interval_past", "interval_through", "intervals"]

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True, repr=False)
class Bounds(Shown):
    """Bounds on $C f(x) - t$ over boxes.

    Attributes:
        lower: `[B, R]`.
        A: coefficients on the input in the linear bound of each row, `[B, R, *shape]`; `None` for intervals.

    With `rounding` a bound is lowered by that share of the absolute values that it was summed from, so that it also
    holds of sums of floating-point numbers: 1e-12 is far above what float64 loses, 1e-5 what float32 does.
    """

    lower: Tensor
    A: Tensor | None = None


def ibp(model: nn.Module | Layers, box: Box, prop: Property | None = None, *, rounding: float = 0.0) -> Range | Bounds:
    """Interval bounds.

    An affine layer maps centre and radius to $c' = W c + b$, $r' = |W| r$, a monotone activation the two ends. With a
    property its matrix is merged into a last affine layer, which is tighter than bounding the outputs first.

    Args:
        model: network, in evaluation mode as far as bounds go; gradients flow to weights and boxes.
        box: box of inputs.
        prop: rows to bound; without it the outputs themselves are.
        rounding: share by which bounds are lowered, see `Bounds`.

    Returns:
        Lower and upper bounds of the outputs `[B, *out]`, or `Bounds` of the property's rows.
    """
    layers = model if isinstance(model, Layers) else Layers(model, box.lower.shape[1:])
    ranges, last = intervals(layers, box, rounding)
    if prop is None:
        return last
    C, t = prop.C.to(last[0]), prop.t.to(last[0])
    tail = layers.parts[-1] if layers.parts else None
    if isinstance(tail, Affine) and isinstance(tail.layer, nn.Linear) and ranges[-1][0].dim() == 2:
        low, high = ranges[-1]
        W, b = C @ tail.layer.weight, C @ tail.layer.bias if tail.layer.bias is not None else C.new_zeros(len(C))
        lower = (low + high) / 2 @ W.T + b - (high - low) / 2 @ W.abs().T - t
        terms = tail.magnitude(low, high) if rounding else None
    else:
        low, high = last
        lower = (low + high) / 2 @ C.T - (high - low) / 2 @ C.abs().T - t
        terms = torch.maximum(low.abs(), high.abs()) if rounding else None
    return Bounds(lower if terms is None else lower - rounding * (terms @ C.abs().T + t.abs()))


def intervals(layers: Layers, box: Box, rounding: float = 0.0) -> tuple[list[Range], Range]:
    """Bounds of the inputs of every layer, and of the outputs."""
    low, high = box.lower, box.upper
    ranges: list[Range] = []
    waiting: list[Range] = []
    for part in layers.parts:
        ranges.append((low, high))
        if isinstance(part, Mark):
            low, high, _ = interval_past(part, (low, high), waiting, rounding)
        else:
            low, high = interval_through(part, low, high, rounding)
    return ranges, (low, high)


def interval_past(
    mark: Mark, ends: Range, waiting: list[Range], rounding: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Intervals past a mark; behind a join also what its outputs are summed from."""
    if mark.kind == "fork":
        waiting.append(ends)
        return *ends, None
    if mark.kind == "turn":
        before = waiting.pop()
        waiting.append(ends)
        return *before, None
    (low, high), (l, h) = ends, waiting.pop()
    sizes = torch.maximum(low.abs(), high.abs()) + torch.maximum(l.abs(), h.abs()) if rounding else None
    slack = 0.0 if sizes is None else rounding * sizes
    return low + l - slack, high + h + slack, sizes


def interval_through(part: Affine | MaxPool | str, low: Tensor, high: Tensor, rounding: float) -> Range:
    """Intervals through one layer."""
    if isinstance(part, str):
        return ACTIVATIONS[part](low), ACTIVATIONS[part](high)
    if isinstance(part, MaxPool):
        return part.forward(low), part.forward(high)
    center, radius = part.forward((low + high) / 2), part.absolute((high - low) / 2)
    if rounding:
        radius = radius + rounding * part.magnitude(low, high)
    return center - radius, center + radius
