"""Bounds on the margins of a label against every other class, each box with a label of its own.

`bounds.ibp` and `bounds.crown` bound the rows of one property for all boxes; here each box asks about its own label, and
gradients flow to weights and boxes, for training by bounds and attacks on them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.robustness.affine_layers import Affine
from torchfolio.robustness.backward_bounds import linear_bounds
from torchfolio.robustness.interval_bounds import intervals
from torchfolio.robustness.layer_list import Layers
from torchfolio.robustness.preactivation_bounds import activation_ranges
from torchfolio.robustness.properties import Box

__all__ = ["crown_margins", "interval_margins"]

PAIRS = 32
"""Classes up to which all pairs are bounded in one matrix product; of more, label by label."""


def interval_margins(model: nn.Module | Layers, box: Box, labels: Tensor, *, rounding: float = 0.0) -> Tensor:
    """Interval lower bounds on $z_y - z_j$.

    A last linear layer is merged with the margins: with centre $c$ and radius $r$ of its inputs,

    $$(W_y - W_j) c + b_y - b_j - |W_y - W_j|\\, r.$$

    Args:
        model: network with bounds, see `bounds.KNOWN`; taken in evaluation mode.
        box: boxes of inputs.
        labels: label $y$ of each box `[B]`.
        rounding: share by which bounds are lowered, see `bounds.Bounds`.

    Returns:
        `[B, K]`, 0 at the label.
    """
    layers = model if isinstance(model, Layers) else Layers(model, box.lower.shape[1:])
    ranges, (low, high) = intervals(layers, box, rounding)
    tail = layers.parts[-1] if layers.parts else None
    terms = None
    if isinstance(tail, Affine) and isinstance(tail.layer, nn.Linear) and ranges[-1][0].dim() == 2:
        low, high = ranges[-1]
        center, spread = tail.forward((low + high) / 2), _spread(tail.layer.weight, (high - low) / 2, labels)
        terms = tail.magnitude(low, high) if rounding else None
    else:
        center, radius = (low + high) / 2, (high - low) / 2
        spread = radius + _of_label(radius, labels)
        terms = torch.maximum(low.abs(), high.abs()) if rounding else None
    margins = _of_label(center, labels) - center - spread
    if terms is not None:
        margins = margins - rounding * (terms + _of_label(terms, labels))
    return margins.scatter(1, labels[:, None], 0.0)


def _of_label(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(1, labels[:, None])


def _spread(weight: Tensor, radius: Tensor, labels: Tensor) -> Tensor:
    """$|W_y - W_j|\\, r$, `[B, K]`, without a tensor of boxes by classes by units."""
    if len(weight) <= PAIRS:
        pairs = (weight[:, None] - weight[None]).abs().flatten(0, 1)
        every = (radius @ pairs.T).view(len(radius), len(weight), len(weight))
        return every[torch.arange(len(radius), device=radius.device), labels]
    spread = radius.new_zeros(len(radius), len(weight))
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        spread = spread.index_put((rows,), radius[rows] @ (weight[label] - weight).abs().T)
    return spread


def crown_margins(
    model: nn.Module | Layers, box: Box, labels: Tensor, *, intermediate: str = "crown", rounding: float = 0.0
) -> Tensor:
    """CROWN's lower bounds on $z_y - z_j$, nowhere below the interval ones.

    Args:
        model: network with bounds, see `bounds.KNOWN`; taken in evaluation mode.
        box: boxes of inputs.
        labels: label $y$ of each box `[B]`.
        intermediate: way in which the inputs of activations are bounded: `"crown"` or `"ibp"`.
        rounding: share by which bounds are lowered, see `bounds.Bounds`.

    Returns:
        `[B, K]`, 0 at the label.
    """
    layers = model if isinstance(model, Layers) else Layers(model, box.lower.shape[1:])
    ranges, terms = activation_ranges(layers, box, intermediate, rounding=rounding)
    eye = torch.eye(layers.outputs[0], dtype=box.lower.dtype, device=box.lower.device)
    lower, _, scale = linear_bounds(layers, len(layers.parts), eye[labels][:, None] - eye, ranges, box, terms=terms)
    cut = interval_margins(layers, box, labels, rounding=rounding)
    return torch.maximum(lower - rounding * scale, cut).scatter(1, labels[:, None], 0.0)
