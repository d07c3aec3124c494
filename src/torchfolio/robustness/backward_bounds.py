"""Linear bounds of rows, propagated backward from any layer to the network's input."""

from __future__ import annotations

import torch
from torch import Tensor

from torchfolio.robustness.activation_lines import lines
from torchfolio.robustness.affine_layers import Affine
from torchfolio.robustness.interval_bounds import Range
from torchfolio.robustness.layer_list import Layers, Mark
from torchfolio.robustness.patch_bounds import Window
from torchfolio.robustness.pooling_bounds import MaxPool
from torchfolio.robustness.properties import Box

__all__ = ["linear_bounds", "window_bounds"]


def window_bounds(
    layers: Layers, k: int, stop: int, window: Window, ranges: dict[int, Range], box: Box, terms: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """`linear_bounds` of the rows of a window, `[B, P, Q]` or `[B, P Q]`, and their scales."""
    d: Tensor = window.A.new_zeros(())
    scale, counted = d, False
    for i in range(k - 1, stop - 1, -1):
        part = layers.parts[i]
        if isinstance(part, str):
            sizes = None
            if terms:
                before = terms.get(i - 1)
                sizes = torch.maximum(ranges[i][0].abs(), ranges[i][1].abs()) if before is None else before
                sizes, counted = sizes + (part != "relu"), before is not None
            window, constant, absolute = window.through(lines(part, *ranges[i]), sizes)
            scale = scale if absolute is None else scale + absolute
        else:
            assert isinstance(part, Affine)
            window = window.cleaned(layers.shapes[i + 1])
            if terms and not counted:
                scale = scale + window.weighed(terms[i], window.A.abs())
            window, constant = part.window_backward(window, layers.shapes[i])
            counted = False
        d = d + constant
    if not stop:
        size = window.A.abs()
        if terms:
            scale = scale + window.weighed(torch.maximum(box.lower.abs(), box.upper.abs()), size)
        return window.weighed(box.center) - window.weighed(box.radius, size) + d, scale
    A = window.spread(layers.shapes[stop])
    bound, _, rest = linear_bounds(layers, stop, A, ranges, box, terms=terms, counted=counted)
    shape = (len(window.top), window.A.shape[2])
    return bound.view(-1, *shape) + d, rest.view(-1, *shape) + scale


def linear_bounds(
    layers: Layers,
    k: int,
    A: Tensor,
    ranges: dict[int, Range],
    box: Box,
    alphas: dict[int, Tensor] | None = None,
    terms: dict[int, Tensor] | None = None,
    betas: dict[int, Tensor] | None = None,
    behind: dict[int, Tensor] | None = None,
    counted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds `[B, R]` of rows on the inputs of layer `k`, the coefficients on the network's input, and scales.

    With `betas`, multipliers `[B, R, ...]` of the inputs of activations, it is a bound of the rows less those products,
    which bounds the rows themselves where every product is known not to be negative. The coefficients behind each
    activation are put into `behind`. Rows have a batch axis of 1 up to the first activation, as boxes matter only from there on. The scale of a bound is
    what its sums add up in absolute value, 0 without `terms`; `counted` tells that those of the layer before are in it already,
    by the activation behind it.
    """
    d = A.new_zeros(A.shape[:2])
    scale = A.new_zeros(A.shape[:2])
    waiting: list[Tensor] = []
    i = k
    while i:
        i -= 1
        part = layers.parts[i]
        if isinstance(part, Mark):
            if terms and not counted and part.kind == "join":
                scale = scale + _weighed(A.abs(), terms[i])
            A, i = _back(part, A, i, waiting)
            counted = False
            continue
        if isinstance(part, Affine):
            if terms and not counted:
                scale = scale + _weighed(A.abs(), terms[i])
            A, constant = part.backward(A, layers.shapes[i])
            counted = False
        else:
            sizes = None
            if terms:
                # No slope is above 1, so coefficients behind the activation are no smaller than before it.
                before = terms.get(i - 1)
                sizes = torch.maximum(ranges[i][0].abs(), ranges[i][1].abs()) if before is None else before
                sizes, counted = sizes + (part != "relu"), before is not None
            if behind is not None:
                behind[i] = A
            if isinstance(part, MaxPool):
                A, constant, absolute = part.backward(A, *ranges[i], sizes)
            else:
                A, constant, absolute = _through(A, *lines(part, *ranges[i], (alphas or {}).get(i)), sizes)
            scale = scale if absolute is None else scale + absolute
            if betas and i in betas:
                A, counted = A - betas[i], False
        d = d + constant
    # Products with vectors pass over the coefficients, which are many, less often than their signs would.
    size = A.abs()
    bound = _weighed(A, box.center) - _weighed(size, box.radius) + d
    if terms:
        scale = scale + _weighed(size, torch.maximum(box.lower.abs(), box.upper.abs()))
    return bound, A.expand(max(len(box), len(A)), *A.shape[1:]), scale


def _back(mark: Mark, A: Tensor, i: int, waiting: list[Tensor]) -> tuple[Tensor, int]:
    """Coefficients before a mark, and the place to go on from: rows that begin within a path have no part in the other."""
    if mark.kind == "join":
        waiting.append(A)
    elif mark.kind == "turn" and waiting:
        other = waiting.pop()
        waiting.append(A)
        return other, i
    elif mark.kind == "turn":
        return A, mark.fork
    elif waiting:
        return A + waiting.pop(), i
    return A, i


def _weighed(A: Tensor, *values: Tensor) -> Tensor:
    """$\\sum_i A_{ri} v_i$ of coefficients `[B, R, ...]` and values `[B, ...]`, with several on a last axis."""
    columns = torch.stack([v.flatten(1) for v in values], 2)
    batch = max(len(A), len(columns))
    sums = torch.bmm(A.flatten(2).expand(batch, -1, -1), columns.expand(batch, -1, -1))
    return sums if len(values) > 1 else sums[..., 0]


def _through(
    A: Tensor, slope_low: Tensor, cut_low: Tensor, slope_high: Tensor, cut_high: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Coefficients behind an activation to those before it, what intercepts give, and the coefficients' sum over `sizes`."""
    positive, negative = A.clamp_min(0), A.clamp_max(0)
    more = () if sizes is None else (sizes.expand_as(cut_high),)
    per_row = slope_low.dim() == A.dim()
    up = _weighed(positive, cut_low[:, 0] if per_row else cut_low, *more)  # with slopes of a row's own: ReLUs, cut at 0
    down = _weighed(negative, cut_high, *more)
    A = torch.addcmul(positive * (slope_low if per_row else slope_low[:, None]), negative, slope_high[:, None])
    return (A, up + down, None) if sizes is None else (A, up[..., 0] + down[..., 0], up[..., 1] - down[..., 1])
