"""Sound bounds on the outputs of small networks over boxes of inputs, and verification by splitting them.

- `ibp`: interval bound propagation (Gowal et al., 2018), cheap, loose, differentiable;
- `crown`: linear bounds propagated backward (Zhang et al., NeurIPS 2018), optionally with optimised slopes (Xu et al.,
  "Fast and Complete", ICLR 2021);
- `Interval`, `Crown`, `CrownSplit`: verifiers, the last complete in the limit (`relu_split.ReluSplit` is for wide inputs);
- `milp_verify`: exact, for small ReLU networks.

Networks are (nested) `nn.Sequential`s of the layers in `KNOWN`, taken in evaluation mode.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from torchfolio.measure import untouched
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.properties import Box, Property, Verdict, classification

__all__ = [
    "KNOWN",
    "Bounds",
    "Crown",
    "CrownSplit",
    "ElementwiseAffine",
    "Interval",
    "Layers",
    "crown",
    "ibp",
    "milp_verify",
]

KNOWN = (
    "Linear", "Conv2d", "ReLU", "Tanh", "Sigmoid", "AvgPool2d", "Flatten", "Identity", "Dropout", "BatchNorm1d",
    "BatchNorm2d", "ElementwiseAffine",
)  # fmt: skip
Range = tuple[Tensor, Tensor]
ELEMENTS = 2**25
"""Coefficients that are held at once while the inputs of activations are bounded; more rows are taken in turns."""


class ElementwiseAffine(nn.Module):
    """$x \\odot a + c$ with constants that broadcast: a folded batch norm, a subtracted mean."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _Affine:
    """A layer $x \\mapsto L x + c$, forward, with the absolute values of $L$, and backward."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.mixes = isinstance(layer, nn.Linear | nn.Conv2d | nn.AvgPool2d)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            scale, shift = _folded(layer, x.dim())
            return x * scale + shift
        return layer(x)

    def absolute(self, r: Tensor) -> Tensor:
        """$|L| r$."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(r, layer.weight.abs())
        if isinstance(layer, nn.Conv2d):
            # Through the layer itself, for its padding.
            return layer._conv_forward(r, layer.weight.abs(), None)
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            return r * _folded(layer, r.dim())[0].abs()
        if isinstance(layer, ElementwiseAffine):
            return r * layer.scale.abs()
        return layer(r)  # pools and reshapes have no negative weight and no constant

    def magnitude(self, low: Tensor, high: Tensor) -> Tensor:
        """The largest sum of absolute values that an output can be the sum of: $|L| \\max(|l|, |u|) + |c|$."""
        constant = self.forward(torch.zeros_like(low[:1])).abs()
        return self.absolute(torch.maximum(low.abs(), high.abs())) + constant

    def backward(self, A: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Coefficients on the outputs `[B, R, *out]` to those on the inputs `[B, R, *in]`, and what the constant gives."""
        layer = self.layer
        if isinstance(layer, nn.Linear) and len(shape) == 1:
            constant = A @ layer.bias if layer.bias is not None else A.new_zeros(A.shape[:2])
            return A @ layer.weight, constant
        flat = A.flatten(0, 1)
        if isinstance(layer, nn.Flatten):
            return A.reshape(*A.shape[:2], *shape), A.new_zeros(A.shape[:2])
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            # A transposed convolution whose padding of the output restores `shape`.
            settings: Any = layer.stride, layer.padding, layer.dilation, layer.groups
            back = conv2d_input((len(flat), *shape), layer.weight, flat, *settings)
            constant = flat.flatten(2).sum(2) @ layer.bias if layer.bias is not None else A.new_zeros(len(flat))
            return back.view(*A.shape[:2], *shape), constant.view(A.shape[:2])
        # The transpose of any other affine map is what autograd multiplies by.
        with torch.enable_grad():
            x = torch.zeros(len(flat), *shape, dtype=A.dtype, device=A.device, requires_grad=True)
            y = self.forward(x)
            (back,) = torch.autograd.grad(y, x, flat, create_graph=A.requires_grad)
        constant = (flat * y.detach()).flatten(1).sum(1)
        return back.view(*A.shape[:2], *shape), constant.view(A.shape[:2])


def _folded(layer: nn.BatchNorm1d | nn.BatchNorm2d, dims: int) -> Range:
    """Scale and shift of a batch norm in evaluation mode, to go with inputs of `dims` axes."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise TypeError("interval bounds of a batch norm need its running statistics")
    scale = torch.rsqrt(var + layer.eps)
    scale = scale if layer.weight is None else scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    wide = (1, -1, *[1] * (dims - 2))
    return scale.view(wide), shift.view(wide)


class Layers:
    """A network as a list of affine maps and activations, with the shape of one input of each.

    Args:
        model: a (nested) `nn.Sequential` or a single layer.
        shape: of one input.

    Raises:
        TypeError: on a layer without bounds; names those that have.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int]) -> None:
        self.parts: list[_Affine | str] = []
        self.shapes: list[tuple[int, ...]] = []
        weight = next((p for p in model.parameters()), torch.empty(0))
        x = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            for layer in _flat(model):
                part = _part(layer)
                if part is None:
                    continue
                self.parts.append(part)
                self.shapes.append(tuple(x.shape[1:]))
                x = part.forward(x) if isinstance(part, _Affine) else x
        self.outputs = tuple(x.shape[1:])
        self.dtype, self.device = x.dtype, x.device


AFFINE = (nn.Linear, nn.Conv2d, nn.AvgPool2d, nn.Flatten, nn.BatchNorm1d, nn.BatchNorm2d, ElementwiseAffine)


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of one of the kinds and computes what that kind does, which a subclass may not."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _flat(model: nn.Module) -> list[nn.Module]:
    if _is(model, (nn.Sequential,)):
        assert isinstance(model, nn.Sequential)
        return [layer for child in model for layer in _flat(child)]
    return [model]


def _part(layer: nn.Module) -> _Affine | str | None:
    if _is(layer, (nn.Identity, nn.Dropout)):
        return None
    activations = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
    if type(layer) in activations:
        return activations[type(layer)]
    if _is(layer, AFFINE):
        if isinstance(layer, nn.Flatten) and layer.start_dim != 1:
            raise TypeError("interval bounds need nn.Flatten(1), which keeps the batch axis")
        return _Affine(layer)
    raise TypeError(f"interval bounds for {type(layer).__name__} are not known; known: {', '.join(KNOWN)}")


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class Bounds:
    """Bounds on $C f(x) - t$ over boxes.

    Attributes:
        lower: `[B, R]`.
        A: coefficients on the input in the linear bound that `lower` comes from, `[B, R, *shape]`; `None` for intervals.

    With `rounding` a bound is lowered by that share of the absolute values that it was summed from, so that it also
    holds of sums of floating-point numbers: 1e-12 is far above what float64 loses, 1e-5 what float32 does.
    """

    lower: Tensor
    A: Tensor | None = None


def ibp(model: nn.Module, box: Box, prop: Property | None = None, *, rounding: float = 0.0) -> Range | Bounds:
    """Interval bounds.

    An affine layer maps centre and radius to $c' = W c + b$, $r' = |W| r$, a monotone activation the two ends. With a
    property its matrix is merged into a last affine layer, which is tighter than bounding the outputs first.

    Args:
        model: the network, in evaluation mode as far as bounds go; gradients flow to weights and boxes.
        box: of inputs.
        prop: rows to bound; without it the outputs themselves are.
        rounding: see `Bounds`.

    Returns:
        Lower and upper bounds of the outputs `[B, *out]`, or `Bounds` of the property's rows.
    """
    layers = Layers(model, box.lower.shape[1:])
    ranges, last = _intervals(layers, box, rounding)
    if prop is None:
        return last
    C, t = prop.C.to(last[0]), prop.t.to(last[0])
    tail = layers.parts[-1] if layers.parts else None
    if isinstance(tail, _Affine) and isinstance(tail.layer, nn.Linear):
        low, high = ranges[-1]
        W, b = C @ tail.layer.weight, C @ tail.layer.bias if tail.layer.bias is not None else C.new_zeros(len(C))
        lower = (low + high) / 2 @ W.T + b - (high - low) / 2 @ W.abs().T - t
        terms = tail.magnitude(low, high) if rounding else None
    else:
        low, high = last
        lower = (low + high) / 2 @ C.T - (high - low) / 2 @ C.abs().T - t
        terms = torch.maximum(low.abs(), high.abs()) if rounding else None
    return Bounds(lower if terms is None else lower - rounding * (terms @ C.abs().T + t.abs()))


def _intervals(layers: Layers, box: Box, rounding: float = 0.0) -> tuple[list[Range], Range]:
    """Bounds of the inputs of every layer, and of the outputs."""
    low, high = box.lower, box.upper
    ranges = []
    for part in layers.parts:
        ranges.append((low, high))
        low, high = _step(part, low, high, rounding)
    return ranges, (low, high)


def _step(part: _Affine | str, low: Tensor, high: Tensor, rounding: float) -> Range:
    """Intervals through one layer."""
    if isinstance(part, str):
        return ACTIVATIONS[part](low), ACTIVATIONS[part](high)
    center, radius = part.forward((low + high) / 2), part.absolute((high - low) / 2)
    if rounding:
        radius = radius + rounding * part.magnitude(low, high)
    return center - radius, center + radius


def crown(
    model: nn.Module | Layers,
    box: Box,
    prop: Property,
    *,
    intermediate: str = "crown",
    alpha_steps: int = 0,
    verifier: Crown | None = None,
    rounding: float = 0.0,
) -> Bounds:
    """Linear lower bounds, propagated backward from the property's rows.

    An activation with inputs in $[l, u]$ is enclosed by two lines; a row takes the lower one where its coefficient is
    not negative and the upper one elsewhere. For an unstable ReLU these are $\\alpha z$, $\\alpha = [u \\ge -l]$, and
    $\\frac{u}{u-l}(z - l)$; tanh and sigmoid get chords and tangents.

    Args:
        model: the network.
        box: of inputs.
        prop: rows to bound.
        intermediate: how the inputs of activations are bounded: `"crown"`, cut with intervals, or `"ibp"`.
        alpha_steps: steps of Adam (rate 0.25) on the slopes $\\alpha$ of unstable ReLUs, for the property's rows; the
            best bound is kept.
        verifier: whose hook `adjust` sees the bounds of the inputs of activations.
        rounding: see `Bounds`.
    """
    if intermediate not in ("crown", "ibp"):
        raise ValueError(f"expected intermediate to be 'crown' or 'ibp', got {intermediate!r}")
    layers = model if isinstance(model, Layers) else Layers(model, box.lower.shape[1:])
    ranges, terms = _activation_ranges(layers, box, intermediate, verifier, rounding)
    C, t = prop.C.to(box.lower), prop.t.to(box.lower)
    start = C.view(1, len(C), *layers.outputs)
    lower, coefficients, scale = _backward(layers, len(layers.parts), start, ranges, box, terms=terms)
    lower = lower - rounding * (scale + t.abs())
    if alpha_steps:
        tuned = _optimised(layers, start, ranges, box, alpha_steps, terms)
        if tuned is not None:
            value = tuned[0] - rounding * (tuned[2] + t.abs())
            better = value > lower
            lower = torch.where(better, value, lower)
            coefficients = torch.where(
                better.view(*better.shape, *[1] * (coefficients.dim() - 2)), tuned[1], coefficients
            )
    return Bounds(lower - t, coefficients)


def _activation_ranges(
    layers: Layers, box: Box, intermediate: str, verifier: Crown | None, rounding: float = 0.0
) -> tuple[dict[int, Range], dict[int, Tensor]]:
    """Bounds of the inputs of every activation, by its place; of every affine layer what its outputs are summed from."""
    low, high = box.lower, box.upper
    found: dict[int, Range] = {}
    terms: dict[int, Tensor] = {}
    for k, part in enumerate(layers.parts):
        if isinstance(part, _Affine):
            if rounding:
                terms[k] = part.magnitude(low, high)
            low, high = _step(part, low, high, rounding)
            continue
        # Behind a single layer that mixes its inputs intervals are exact.
        if intermediate == "crown" and (found or sum(isinstance(p, _Affine) and p.mixes for p in layers.parts[:k]) > 1):
            low, high = _tightened(layers, k, low, high, found, box, terms, rounding)
        if verifier is not None:
            low, high = verifier.adjust(low, high)
        found[k] = low, high
        low, high = _step(part, low, high, 0.0)
    return found, terms


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
    widest = max(math.prod(shape) for shape in layers.shapes[: k + 1])
    for part in rows.split(max(1, ELEMENTS // (2 * len(box) * widest))):
        eye = torch.zeros(len(part), flat_low.shape[1], dtype=low.dtype, device=low.device)
        eye[torch.arange(len(part)), part] = 1
        both = torch.cat([eye, -eye]).view(1, 2 * len(part), *low.shape[1:])
        bound, _, scale = _backward(layers, k, both, ranges, box, terms=terms)
        bound = bound - rounding * scale
        tight_low[:, part] = torch.maximum(flat_low[:, part], bound[:, : len(part)])
        tight_high[:, part] = torch.minimum(flat_high[:, part], -bound[:, len(part) :])
    # Rounding must not make a bound cross the other.
    tight_low = torch.minimum(tight_low, tight_high)
    return tight_low.view_as(low), tight_high.view_as(high)


def _backward(
    layers: Layers,
    k: int,
    A: Tensor,
    ranges: dict[int, Range],
    box: Box,
    alphas: dict[int, Tensor] | None = None,
    terms: dict[int, Tensor] | None = None,
    betas: dict[int, Tensor] | None = None,
    behind: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds `[B, R]` of rows on the inputs of layer `k`, the coefficients on the network's input, and scales.

    With `betas`, multipliers `[B, R, ...]` of the inputs of activations, it is a bound of the rows less those products,
    which bounds the rows themselves where every product is known not to be negative. The coefficients behind each
    activation are put into `behind`. Rows have a batch axis of 1 up to the first activation, as boxes matter only from there on. The scale of a bound is
    what its sums add up in absolute value, 0 without `terms`.
    """
    d = A.new_zeros(A.shape[:2])
    scale = A.new_zeros(A.shape[:2])
    counted = False  # the sums of the next affine layer, by the activation behind it
    for i in reversed(range(k)):
        part = layers.parts[i]
        if isinstance(part, _Affine):
            if terms and not counted:
                scale = scale + _weighed(A.abs(), terms[i])
            A, constant = part.backward(A, layers.shapes[i])
            counted = False
        else:
            lines = _lines(part, *ranges[i], (alphas or {}).get(i))
            sizes = None
            if terms:
                # No slope is above 1, so coefficients behind the activation are no smaller than before it.
                before = terms.get(i - 1)
                sizes = torch.maximum(ranges[i][0].abs(), ranges[i][1].abs()) if before is None else before
                sizes, counted = sizes + (part != "relu"), before is not None
            if behind is not None:
                behind[i] = A
            A, constant, absolute = _through(A, *lines, sizes)
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


def _lines(kind: str, low: Tensor, high: Tensor, alpha: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slope and intercept of a line below an activation and of one above, on $[l, u]$."""
    if kind == "relu":
        return _relu_lines(low, high, alpha)
    return _sigmoidal_lines(kind, low, high)


def _relu_lines(low: Tensor, high: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    on, off = low >= 0, high <= 0
    width = torch.where(on | off, torch.ones_like(low), high - low)
    slope = torch.where(on, torch.ones_like(low), torch.where(off, torch.zeros_like(low), high / width))
    cut = torch.where(on | off, torch.zeros_like(low), -slope * low)
    below = (high >= -low).to(low.dtype)
    if alpha is None:
        below = torch.where(on | off, slope, below)
        return below, torch.zeros_like(low), slope, cut
    # A row of its own slope for each row of the property: [B, R, ...].
    below = torch.where((on | off)[:, None], slope[:, None], alpha)
    return below, torch.zeros_like(below), slope, cut


def _sigmoidal_lines(kind: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f = ACTIVATIONS[kind]

    def derivative(z: Tensor) -> Tensor:
        y = f(z)
        return 1 - y * y if kind == "tanh" else y * (1 - y)

    thin = high - low < 1e-6
    chord = (f(high) - f(low)) / torch.where(thin, torch.ones_like(low), high - low)
    middle = (low + high) / 2
    # On a thin interval: a tangent, moved by more than the function can bend there.
    chord = torch.where(thin, derivative(middle), chord)
    bend = torch.where(thin, (high - low) ** 2 + 1e-15, torch.zeros_like(low))
    tangent = derivative(middle)
    at = f(middle) - tangent * middle
    concave, convex = low >= 0, high <= 0
    low_slope, low_cut = chord, torch.where(thin, f(middle) - chord * middle, f(low) - chord * low)
    high_slope, high_cut = low_slope, low_cut
    # Concave: the tangent lies above; convex: below.
    high_slope, high_cut = torch.where(concave, tangent, high_slope), torch.where(concave, at, high_cut)
    low_slope, low_cut = torch.where(convex, tangent, low_slope), torch.where(convex, at, low_cut)
    mixed = ~concave & ~convex & ~thin
    up, up_cut = _tangent_from(f, derivative, low, high)
    down, down_cut = _tangent_from(f, derivative, high, low)
    high_slope, high_cut = torch.where(mixed, up, high_slope), torch.where(mixed, up_cut, high_cut)
    low_slope, low_cut = torch.where(mixed, down, low_slope), torch.where(mixed, down_cut, low_cut)
    return low_slope, low_cut - bend, high_slope, high_cut + bend


def _tangent_from(f, derivative, end: Tensor, other: Tensor) -> Range:
    """The line through $(e, f(e))$ that touches the function on the other side of 0, or the chord where that lies outside.

    By bisection on the point of touch; its end on the safe side is taken, where the line lies beyond the function.
    """
    sign = torch.where(other > end, torch.ones_like(end), -torch.ones_like(end))
    near, far = torch.zeros_like(end), sign * other
    for _ in range(30):
        p = (near + far) / 2
        z = sign * p
        # Beyond the point of touch the derivative is smaller than the slope of the chord from the end.
        beyond = derivative(z) * (z - end).abs() < sign * (f(z) - f(end))
        far, near = torch.where(beyond, p, far), torch.where(beyond, near, p)
    z = sign * near
    slope = derivative(z)  # steeper than the tangent through the end: safe
    chord = (f(other) - f(end)) / (other - end).where(other != end, torch.ones_like(end))
    touches = derivative(other) * (other - end).abs() < sign * (f(other) - f(end))
    slope = torch.where(touches, slope, chord)
    return slope, f(end) - slope * end


def _optimised(
    layers: Layers, start: Tensor, ranges: dict[int, Range], box: Box, steps: int, terms: dict[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The best of the bounds over slopes of unstable ReLUs, each row with its own, as `_backward` gives them."""
    rows = start.shape[1]
    alphas = {}
    for k, (low, high) in ranges.items():
        if layers.parts[k] == "relu" and bool(((low < 0) & (high > 0)).any()):
            first = (high >= -low).to(low.dtype)[:, None]
            alphas[k] = first.expand(len(low), rows, *low.shape[1:]).clone().requires_grad_()
    if not alphas:
        return None
    optimizer = torch.optim.Adam(alphas.values(), lr=0.25, maximize=True)
    best = None
    for step in range(steps + 1):
        with torch.enable_grad():
            lower, A, scale = _backward(layers, len(layers.parts), start, ranges, box, alphas, terms)
        found = lower.detach(), A.detach(), scale.detach()
        if best is None:
            best = found
        else:
            better = found[0] > best[0]
            wide = better.view(*better.shape, *[1] * (A.dim() - 2))
            best = tuple(
                torch.where(w, new, old) for w, new, old in zip((better, wide, better), found, best, strict=True)
            )
        if step == steps:
            break
        optimizer.zero_grad()
        lower.backward(torch.ones_like(lower), inputs=list(alphas.values()))
        optimizer.step()
        with torch.no_grad():
            for alpha in alphas.values():
                alpha.clamp_(0, 1)
    assert best is not None
    return best[0], best[1], best[2]


class Interval:
    """A verifier by interval bounds of the whole box: sound, never falsifies by more than trying the centre.

    Args:
        dtype: that bounds are computed in. Bounds are lowered by what their rounding may be, 1e-12 in float64 and 1e-5
            in float32 of the absolute values that were summed.
    """

    name = "interval"

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.rounding = 1e-12 if dtype == torch.float64 else 1e-5

    def verify(self, model: nn.Module, lower: Tensor, upper: Tensor, label: int, timeout: float = 60.0) -> Verdict:
        """Whether all inputs between `lower` and `upper`, of one input's shape, have the label."""
        box = Box(lower[None], upper[None])
        with untouched(model, training=False), torch.no_grad():
            classes = model(box.center.to(next(model.parameters()).dtype)).shape[1]
        return self.decide(model, box, classification(label, classes), timeout)

    def decide(self, model: nn.Module, box: Box, prop: Property, timeout: float = 60.0) -> Verdict:
        """Whether a property holds on one box.

        Args:
            model: the network, left as it is.
            box: one box of inputs.
            prop: the property.
            timeout: seconds, of verifiers that search.
        """
        if len(box) != 1:
            raise ValueError(f"expected one box, got {len(box)}")
        started = time.perf_counter()
        exact = copy.deepcopy(model).to(self.dtype).eval().requires_grad_(False)
        verdict = self._decide(exact, box.to(self.dtype), prop, started + timeout)
        if verdict.witness is not None and not self._confirmed(exact, box, prop, verdict.witness):
            verdict = Verdict("unknown", None, verdict.seconds, verdict.boxes)
        return Verdict(verdict.status, verdict.witness, time.perf_counter() - started, verdict.boxes)

    @torch.no_grad()
    def _confirmed(self, model: nn.Module, box: Box, prop: Property, witness: Tensor) -> bool:
        inside = bool(box.to(self.dtype).contains(witness[None]).all())
        return inside and bool(prop.violated(model(witness[None]))[0])

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        with torch.no_grad():
            bounds = ibp(model, box, prop, rounding=self.rounding)
        assert isinstance(bounds, Bounds)
        return self._judge(model, box, prop, bounds)

    def _judge(self, model: nn.Module, box: Box, prop: Property, bounds: Bounds) -> Verdict:
        if bool(prop.holds(bounds.lower)[0]):
            return Verdict("verified", boxes=1)
        with torch.no_grad():
            found = prop.violated(model(box.center))
        return Verdict("falsified", box.center[0], boxes=1) if bool(found[0]) else Verdict("unknown", boxes=1)


class Crown(Interval):
    """A verifier by CROWN bounds of the whole box.

    Args:
        intermediate: see `crown`.
        alpha_steps: see `crown`.
        dtype: see `Interval`.

    A subclass may change what the verifier believes in `shrink` and `adjust`; this class changes nothing.
    """

    name = "crown"

    def __init__(self, intermediate: str = "crown", alpha_steps: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.intermediate, self.alpha_steps = intermediate, alpha_steps

    def shrink(self, box: Box) -> Box:
        """The box that is looked at in the place of the one that was asked for."""
        return box

    def adjust(self, low: Tensor, high: Tensor) -> Range:
        """The bounds of the inputs of an activation that are used in the place of those found."""
        return low, high

    def bounds(self, layers: Layers, box: Box, prop: Property) -> Bounds:
        with torch.no_grad():
            return crown(
                layers, box, prop, intermediate=self.intermediate, alpha_steps=self.alpha_steps, verifier=self,
                rounding=self.rounding,
            )  # fmt: skip

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        box = self.shrink(box)
        return self._judge(model, box, prop, self.bounds(Layers(model, box.lower.shape[1:]), box, prop))


class CrownSplit(Crown):
    """CROWN on ever smaller boxes: a box that is not verified is halved across the coordinate of most influence.

    The search begins with PGD. Boxes of least bound come first; of each the centre and the corner that the linear bound
    points to are tried. Complete in the limit: with time every property is decided, but for ties.

    Args:
        batch: boxes that are bounded at once.
        max_boxes: after which the answer is unknown.
        attack_steps: of PGD in the beginning, from 32 starts; 0 leaves it out.
        intermediate: see `crown`.
        alpha_steps: see `crown`.
        dtype: see `Interval`.
    """

    name = "crown+split"

    def __init__(
        self,
        batch: int = 256,
        max_boxes: int | None = None,
        attack_steps: int = 50,
        intermediate: str = "crown",
        alpha_steps: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(intermediate, alpha_steps, dtype)
        self.batch, self.max_boxes, self.attack_steps = batch, max_boxes, attack_steps

    def keep(self, boxes: Box) -> Tensor:
        """Which of the halves are looked at further, bool `[B]`."""
        return torch.ones(len(boxes), dtype=torch.bool, device=boxes.lower.device)

    def _decide(self, model: nn.Module, box: Box, prop: Property, deadline: float) -> Verdict:
        box = self.shrink(box)
        witness = _attack(model, box, prop, self.attack_steps) if self.attack_steps else None
        if witness is not None:
            return Verdict("falsified", witness)
        layers = Layers(model, box.lower.shape[1:])
        queue = _Queue(box)
        seen = 0
        while len(queue):
            if time.perf_counter() > deadline or (self.max_boxes is not None and seen >= self.max_boxes):
                return Verdict("unknown", boxes=seen)
            boxes = queue.pop(self.batch)
            seen += len(boxes)
            bounds = self.bounds(layers, boxes, prop)
            open_ = ~prop.holds(bounds.lower)
            if not bool(open_.any()):
                continue
            assert bounds.A is not None
            boxes, lower, A = boxes[open_], bounds.lower[open_], bounds.A[open_]
            witness = _tried(model, boxes, prop, lower, A)
            if witness is not None:
                return Verdict("falsified", witness, boxes=seen)
            halves, order = _halved(boxes, prop, lower, A)
            if halves is None:
                return Verdict("unknown", boxes=seen)
            kept = self.keep(halves)
            queue.push(halves[kept], order[kept])
        return Verdict("verified", boxes=seen)


class _Queue:
    """Boxes, taken in the order of their bounds, the least first."""

    def __init__(self, box: Box) -> None:
        self.boxes, self.order = box, box.lower.new_zeros(1)

    def __len__(self) -> int:
        return len(self.boxes)

    def push(self, boxes: Box, order: Tensor) -> None:
        self.boxes, self.order = Box.cat([self.boxes, boxes]), torch.cat([self.order, order])

    def pop(self, count: int) -> Box:
        index = self.order.argsort(stable=True)
        taken, left = self.boxes[index[:count]], index[count:]
        self.boxes, self.order = self.boxes[left], self.order[left]
        return taken


def _worst(prop: Property, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The row that holds up each box, the best one of its worst group, and its bound, `[B]`."""
    groups = prop.by_group(lower)
    value, group = groups.min(1)
    inside = prop.groups.to(lower.device)[None] == group[:, None]
    row = torch.where(inside, lower, -torch.inf).argmax(1)
    return row, value


def _halved(boxes: Box, prop: Property, lower: Tensor, A: Tensor) -> tuple[Box | None, Tensor]:
    """Both halves of every box, across the coordinate on which its bound depends most, and their places in the queue."""
    row, value = _worst(prop, lower)
    influence = (A[torch.arange(len(A)), row].abs() * (boxes.upper - boxes.lower)).flatten(1)
    # Where the bound depends on nothing any more, the widest coordinate.
    width = (boxes.upper - boxes.lower).flatten(1)
    influence = torch.where(influence.amax(1, keepdim=True) > 0, influence, width)
    axis = influence.argmax(1, keepdim=True)
    low, high = boxes.lower.flatten(1), boxes.upper.flatten(1)
    middle = (low.gather(1, axis) + high.gather(1, axis)) / 2
    if bool(((middle <= low.gather(1, axis)) | (middle >= high.gather(1, axis))).all()):
        return None, value  # no number lies between the ends any more
    shape = boxes.lower.shape
    left = Box(boxes.lower, high.scatter(1, axis, middle).view(shape))
    right = Box(low.scatter(1, axis, middle).view(shape), boxes.upper)
    return Box.cat([left, right]), torch.cat([value, value])


@torch.no_grad()
def _tried(model: nn.Module, boxes: Box, prop: Property, lower: Tensor, A: Tensor) -> Tensor | None:
    """A violating input among the centres and the corners that the bounds point to."""
    row, _ = _worst(prop, lower)
    down = A[torch.arange(len(A)), row] > 0
    corners = torch.where(down, boxes.lower, boxes.upper)
    points = torch.cat([boxes.center, corners])
    hits = prop.violated(model(points)).nonzero()[:, 0]
    return points[hits[0]] if len(hits) else None


def _attack(model: nn.Module, box: Box, prop: Property, steps: int) -> Tensor | None:
    """A violating input by PGD on the box, measured in its radii."""
    center, radius = box.center, box.radius

    def scaled(u: Tensor) -> Tensor:
        return model(torch.minimum(torch.maximum(center + radius * u, box.lower), box.upper))

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return -prop.by_group(prop.slack(outputs)).amin(1)

    zeros, label = torch.zeros_like(center), torch.zeros(1, dtype=torch.long, device=center.device)
    generator = torch.Generator(center.device).manual_seed(0)
    settings = {"eps": 1.0, "alpha": torch.linspace(0.5, 0.02, steps), "steps": steps, "restarts": 32}
    found = pgd(scaled, zeros, label, loss=loss, generator=generator, **settings)  # pyright: ignore[reportArgumentType]
    point = torch.minimum(torch.maximum(center + radius * found.x_adv, box.lower), box.upper)
    with torch.no_grad():
        return point[0] if bool(prop.violated(model(point))[0]) else None


def milp_verify(model: nn.Module, box: Box, prop: Property, timeout: float = 60.0) -> Verdict:
    """Decide a property of a ReLU network exactly, by a mixed-integer linear program per row (HiGHS).

    Constants of the "big M" come from CROWN bounds. For about 60 unstable units; rows of one group are asked for together.

    Args:
        model: the network.
        box: one box.
        prop: the property.
        timeout: seconds per program.

    Reference:
        Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming", ICLR 2019.
    """
    from scipy.optimize import Bounds as Limits
    from scipy.optimize import LinearConstraint, milp

    started = time.perf_counter()
    exact = copy.deepcopy(model).double().eval().requires_grad_(False)
    box = box.to(torch.float64)
    layers = Layers(exact, box.lower.shape[1:])
    with torch.no_grad():
        program = _Program(layers, box)
    groups = prop.groups.unique().tolist()
    for group in groups:
        rows = (prop.groups == group).nonzero()[:, 0]
        # Violated where all rows are at most t: minimise s with C_r z - t_r <= s.
        objective, (A, low, high) = program.objective(prop.C[rows].double().numpy(), prop.t[rows].double().numpy())
        limits: Any = [*program.low, -np.inf], [*program.high, np.inf]
        solved = milp(
            objective, constraints=LinearConstraint(A, low, high), integrality=[*program.integrality, 0],
            bounds=Limits(*limits), options={"time_limit": timeout},
        )  # fmt: skip
        if solved.x is None or solved.status not in (0,):
            return Verdict("unknown", seconds=time.perf_counter() - started)
        point = torch.from_numpy(solved.x[: box.lower[0].numel()]).view(box.lower.shape)
        point = torch.minimum(torch.maximum(point, box.lower), box.upper)
        if solved.fun <= 0:
            with torch.no_grad():
                real = bool(prop.violated(exact(point))[0])
            return Verdict(
                "falsified" if real else "unknown", point[0] if real else None, time.perf_counter() - started
            )
    return Verdict("verified", seconds=time.perf_counter() - started)


class _Program:
    """The constraints of a ReLU network: variables are the input, then every activation's output and binary."""

    def __init__(self, layers: Layers, box: Box) -> None:
        if any(isinstance(p, str) and p != "relu" for p in layers.parts):
            raise TypeError("the exact verifier is for networks whose activations are ReLUs")
        ranges, _ = _activation_ranges(layers, box, "crown", None, 1e-12)
        count = box.lower[0].numel()
        self.low, self.high = box.lower.flatten().tolist(), box.upper.flatten().tolist()
        self.integrality: list[int] = [0] * count
        self.rows: list[tuple[dict[int, float], float, float]] = []
        # The current layer's values as affine functions of variables: matrix over `columns`, and a constant.
        W, c, columns = np.eye(count), np.zeros(count), list(range(count))
        for k, part in enumerate(layers.parts):
            if isinstance(part, _Affine):
                L, b = _matrix(part, layers.shapes[k], box)
                W, c = L @ W, L @ c + b
                continue
            low, high = (t.flatten().numpy() for t in ranges[k])
            W, c, columns = self._relu(W, c, columns, low, high)
        self.W, self.c, self.columns = W, c, columns

    def _relu(
        self, W: np.ndarray, c: np.ndarray, columns: list[int], low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """New variables $a = \\max(z, 0)$ with $z = W v + c$, a binary for each unstable unit."""
        outputs = []
        for i in range(len(W)):
            a = len(self.low)
            self.low.append(max(0.0, float(low[i])))
            self.high.append(max(0.0, float(high[i])))
            self.integrality.append(0)
            z = {columns[j]: float(W[i, j]) for j in range(len(columns)) if W[i, j]}
            minus_z = {j: -w for j, w in z.items()}
            if low[i] >= 0:
                self.rows.append(({**minus_z, a: 1.0}, float(c[i]), float(c[i])))
            elif high[i] > 0:
                binary = len(self.low)
                self.low.append(0.0)
                self.high.append(1.0)
                self.integrality.append(1)
                self.rows.append(({**minus_z, a: 1.0}, float(c[i]), np.inf))  # a >= z
                # a <= z - l (1 - q), a <= u q
                self.rows.append(({**minus_z, a: 1.0, binary: -float(low[i])}, -np.inf, float(c[i] - low[i])))
                self.rows.append(({a: 1.0, binary: -float(high[i])}, -np.inf, 0.0))
            outputs.append(a)
        return np.eye(len(outputs)), np.zeros(len(outputs)), outputs

    def objective(self, C: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, tuple[Any, Any, Any]]:
        """Cost and constraints that minimise the largest row of $C z - t$, in one variable more."""
        from scipy.sparse import lil_matrix

        count = len(self.low)
        rows = [*self.rows]
        for weights, offset in zip(C @ self.W, C @ self.c - t, strict=True):
            entry = {column: float(w) for column, w in zip(self.columns, weights, strict=True) if w}
            rows.append(({**entry, count: -1.0}, -np.inf, -float(offset)))
        A = lil_matrix((len(rows), count + 1))
        for i, (entry, _, _) in enumerate(rows):
            for j, value in entry.items():
                A[i, j] = value
        cost = np.zeros(count + 1)
        cost[-1] = 1
        return cost, (A.tocsr(), np.array([r[1] for r in rows]), np.array([r[2] for r in rows]))


def _matrix(part: _Affine, shape: Sequence[int], box: Box) -> tuple[np.ndarray, np.ndarray]:
    """An affine layer as a matrix and a constant."""
    count = int(np.prod(shape))
    eye = torch.eye(count, dtype=torch.float64).view(count, *shape)
    constant = part.forward(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
    return (part.forward(eye).flatten(1) - constant).T.numpy(), constant[0].numpy()
