"""Bounds of the inputs of all activations, each from those of the activations before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from torchfolio.robustness.affine_layers import Affine, ElementwiseAffine
from torchfolio.robustness.backward_bounds import linear_bounds, window_bounds
from torchfolio.robustness.interval_bounds import Range, interval_past, interval_through
from torchfolio.robustness.layer_list import Layers, Mark, joins, mixes
from torchfolio.robustness.patch_bounds import Window, pair
from torchfolio.robustness.properties import Box

__all__ = ["activation_ranges"]

Adjust = Callable[[Tensor, Tensor], Range]
"""What changes the bounds of the inputs of an activation before they are used."""

ELEMENTS = 2**25
"""Coefficients that are held at once while the inputs of activations are bounded; more rows are taken in turns."""


def activation_ranges(
    layers: Layers, box: Box, intermediate: str, adjust: Adjust | None = None, rounding: float = 0.0
) -> tuple[dict[int, Range], dict[int, Tensor]]:
    """Bounds of the inputs of every activation, by its place; of every affine layer what its outputs are summed from."""
    low, high = box.lower, box.upper
    ranges: dict[int, Range] = {}
    terms: dict[int, Tensor] = {}
    waiting: list[Range] = []
    for k, part in enumerate(layers.parts):
        if isinstance(part, Mark):
            low, high, sizes = interval_past(part, (low, high), waiting, rounding)
            if sizes is not None:
                terms[k] = sizes
            continue
        if isinstance(part, Affine):
            if rounding:
                terms[k] = part.magnitude(low, high)
            low, high = interval_through(part, low, high, rounding)
            continue
        # Behind a single layer that mixes its inputs intervals are exact; behind an activation they are as good as those
        # of its inputs.
        sums = k > 0 and (isinstance(layers.parts[k - 1], Affine) or joins(layers.parts[k - 1]))
        if intermediate == "crown" and sums and (ranges or sum(map(mixes, layers.parts[:k])) > 1):
            low, high = _tightened(layers, k, low, high, ranges, box, terms, rounding)
        if adjust is not None:
            low, high = adjust(low, high)
        ranges[k] = low, high
        low, high = interval_through(part, low, high, 0.0)
    return ranges, terms


def _tightened(
    layers: Layers, k: int, low: Tensor, high: Tensor, ranges: dict[int, Range], box: Box, terms: dict[int, Tensor],
    rounding: float,
) -> Range:  # fmt: skip
    """Bounds of the inputs of an activation by CROWN, for units that are unstable in some box."""
    flat_low, flat_high = low.flatten(1), high.flatten(1)
    unstable = ((flat_low < 0) & (flat_high > 0)).any(0) if layers.parts[k] == "relu" else (flat_low < flat_high).any(0)
    rows = unstable.nonzero()[:, 0]
    if not len(rows):
        return low, high
    tight_low, tight_high = flat_low.clone(), flat_high.clone()
    for part, lower, upper in (
        _by_windows(layers, k, unstable, ranges, box, terms, rounding)
        if _plan(layers, k)[0] < k
        else _by_units(layers, k, rows, ranges, box, terms, rounding)
    ):
        tight_low[:, part] = torch.maximum(flat_low[:, part], lower)
        tight_high[:, part] = torch.minimum(flat_high[:, part], upper)
    # Rounding must not make a bound cross the other.
    tight_low = torch.minimum(tight_low, tight_high)
    return tight_low.view_as(low), tight_high.view_as(high)


def _by_units(
    layers: Layers, k: int, rows: Tensor, ranges: dict[int, Range], box: Box, terms: dict[int, Tensor], rounding: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some units of layer `k` at a time, with their bounds `[B, units]`."""
    shape = layers.shapes[k]
    widest = max(math.prod(shape) for shape in layers.shapes[: k + 1])
    for part in rows.split(max(1, ELEMENTS // (2 * len(box) * widest))):
        eye = torch.zeros(len(part), math.prod(shape), dtype=box.lower.dtype, device=rows.device)
        eye[torch.arange(len(part)), part] = 1
        both = torch.cat([eye, -eye]).view(1, 2 * len(part), *shape)
        bound, _, scale = linear_bounds(layers, k, both, ranges, box, terms=terms)
        bound = bound - rounding * scale
        yield part, bound[:, : len(part)], -bound[:, len(part) :]


def _by_windows(
    layers: Layers, k: int, unstable: Tensor, ranges: dict[int, Range], box: Box, terms: dict[int, Tensor],
    rounding: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """As `_by_units`, by the windows of all channels at some positions."""
    channels, height, width = layers.shapes[k]
    places = unstable.view(channels, -1).any(0).nonzero()[:, 0]
    stop, largest = _plan(layers, k)
    for part in places.split(max(1, ELEMENTS // (2 * channels * len(box) * largest))):
        window = Window.of_units(channels, part // width, part % width, box.lower)
        bound, scale = window_bounds(layers, k, stop, window, ranges, box, terms)
        lower, upper = (bound - rounding * scale).view(len(box), len(part), 2, channels).permute(2, 0, 3, 1)
        units = torch.arange(channels, device=part.device)[:, None] * height * width + part
        yield units.flatten(), lower.flatten(1), -upper.flatten(1)


def _plan(layers: Layers, k: int) -> tuple[int, int]:
    """The layer down to which windows pay for the units of layer `k`, and the most coefficients that a unit has by then."""
    if len(layers.shapes[k]) != 3:
        return k, 0
    h = w = 1
    largest, i = layers.shapes[k][0], k
    while i:
        part, shape = layers.parts[i - 1], layers.shapes[i - 1]
        layer = part.layer if isinstance(part, Affine) and part.by_windows else None
        if isinstance(layer, nn.Conv2d | nn.AvgPool2d):
            kernel, stride, dilation = map(pair, (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1)))
            h = (h - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1
            w = (w - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1
        elif layer is None and not isinstance(part, str):
            break
        repeats = isinstance(layer, ElementwiseAffine) and shape != layers.shapes[i]
        if len(shape) != 3 or repeats or 2 * h * w > shape[1] * shape[2]:
            break
        largest, i = max(largest, shape[0] * h * w), i - 1
    if not any(isinstance(part, str) for part in layers.parts[i:k]):
        return k, 0  # nothing but one matrix would be saved
    if i:
        largest = max(largest, *(math.prod(shape) for shape in layers.shapes[: i + 1]))
    return i, largest
