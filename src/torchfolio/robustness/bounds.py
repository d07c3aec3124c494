"""Sound bounds on the outputs of small networks over boxes of inputs.

- `ibp`: interval bound propagation (Gowal et al., 2018), cheap, loose, differentiable;
- `crown`: linear bounds propagated backward (Zhang et al., NeurIPS 2018), optionally with optimised slopes (Xu et al.,
  "Fast and Complete", ICLR 2021).

What is decided with them is in `verifiers` and `relu_split`. Networks are (nested) `nn.Sequential`s of the layers in `KNOWN`, taken in evaluation mode.
Sums of two paths (`Residual`, the blocks of `models.ResNetCIFAR`) are known too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from torchfolio.models.resnet import BasicBlock, Subsample
from torchfolio.robustness.patch_bounds import Window, average_kernel, pair
from torchfolio.robustness.pooling_bounds import MaxPool
from torchfolio.robustness.properties import Box, Property

if TYPE_CHECKING:
    from torchfolio.robustness.verifiers import Crown

__all__ = [
    "KNOWN",
    "Bounds",
    "ElementwiseAffine",
    "Layers",
    "Residual",
    "activation_ranges",
    "crown",
    "ibp",
    "intervals",
    "linear_bounds",
    "matrix_of",
    "optimised_bounds",
    "row_bounds",
]

KNOWN = (
    "Linear", "Conv2d", "ReLU", "Tanh", "Sigmoid", "AvgPool2d", "MaxPool2d", "Flatten", "Unflatten", "Identity", "Dropout",
    "BatchNorm1d", "BatchNorm2d", "AdaptiveAvgPool2d", "ElementwiseAffine", "Residual", "BasicBlock",
)  # fmt: skip
"""Layers that bounds are known of."""
Range = tuple[Tensor, Tensor]
ELEMENTS = 2**25
"""Coefficients that are held at once while the inputs of activations are bounded; more rows are taken in turns."""
STEPS = 6
"""Newton's steps to the point where a line touches tanh or sigmoid."""


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


class Residual(nn.Module):
    """$F(x) + s(x)$, the sum of two paths of equal output shape.

    Args:
        body: network $F$ of layers with bounds.
        shortcut: network $s$ likewise; the identity by default.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        body, shortcut = self.body(x), self.shortcut(x)
        if body.shape != shortcut.shape:
            raise ValueError(f"expected paths of one shape, got {tuple(body.shape)} and {tuple(shortcut.shape)}")
        return body + shortcut


@dataclass(frozen=True)
class Mark:
    """Where a sum of two paths begins (`"fork"`), passes from the shortcut to the body (`"turn"`), and ends (`"join"`).

    Forward, and backward in the other order, a stack holds what waits for the other path.

    Attributes:
        kind: see above.
        fork: place of the fork among the parts.
    """

    kind: str
    fork: int


class Affine:
    """A layer $x \\mapsto L x + c$, forward, with the absolute values of $L$, and backward."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.mixes = isinstance(layer, nn.Linear | nn.Conv2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d)
        self.by_windows = isinstance(layer, nn.BatchNorm2d | ElementwiseAffine) or (
            isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        ) or (isinstance(layer, nn.AvgPool2d) and _plain(layer))  # fmt: skip

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

    def window_backward(self, window: Window, shape: tuple[int, ...]) -> tuple[Window, Tensor]:
        """As `backward`, of coefficients on windows."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return window.convolved(layer.weight, layer.bias, layer)
        if isinstance(layer, nn.AvgPool2d):
            return window.convolved(average_kernel(layer, shape[0], window.A), None, layer)
        assert isinstance(layer, nn.BatchNorm2d | ElementwiseAffine)
        scale, shift = _folded(layer, 4) if isinstance(layer, nn.BatchNorm2d) else (layer.scale, layer.shift)
        return window.scaled(scale.expand(1, *shape), shift.expand(1, *shape))

    def backward(self, A: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Coefficients on the outputs `[B, R, *out]` to those on the inputs `[B, R, *in]`, and what the constant gives."""
        layer = self.layer
        if isinstance(layer, nn.Linear) and len(shape) == 1:
            constant = A @ layer.bias if layer.bias is not None else A.new_zeros(A.shape[:2])
            return A @ layer.weight, constant
        flat = A.flatten(0, 1)
        if isinstance(layer, nn.Flatten | nn.Unflatten):
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


def _plain(layer: nn.AvgPool2d) -> bool:
    """Whether every window of a pool has the same divisor."""
    padded = layer.padding not in (0, (0, 0)) and not layer.count_include_pad
    return not (layer.ceil_mode or padded or layer.divisor_override is not None)


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
        self.parts: list[Part] = []
        self.shapes: list[tuple[int, ...]] = []
        weight = next((p for p in model.parameters()), torch.empty(0))
        with torch.no_grad():
            x = self._append(model, torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device))
        self.outputs = tuple(x.shape[1:])
        self.dtype, self.device = x.dtype, x.device

    def _append(self, model: nn.Module, x: Tensor) -> Tensor:
        """Add a network's parts, and return its output."""
        for layer in _flat(model):
            if isinstance(layer, Residual) and type(layer).forward is Residual.forward:
                fork = len(self.parts)
                self._mark("fork", fork, x)
                shortcut = self._append(layer.shortcut, x)
                self._mark("turn", fork, x)
                body = self._append(layer.body, x)
                if body.shape != shortcut.shape:
                    raise ValueError(
                        f"expected paths of one shape, got {tuple(body.shape)} and {tuple(shortcut.shape)}"
                    )
                self._mark("join", fork, body)
                x = body + shortcut
                continue
            part = _part(layer)
            if part is None:
                continue
            self.parts.append(part)
            self.shapes.append(tuple(x.shape[1:]))
            x = part.forward(x) if isinstance(part, Affine | MaxPool) else x
        return x

    def _mark(self, kind: str, fork: int, x: Tensor) -> None:
        self.parts.append(Mark(kind, fork))
        self.shapes.append(tuple(x.shape[1:]))


Part = Affine | MaxPool | Mark | str
AFFINE = (
    nn.Linear, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Unflatten, nn.BatchNorm1d, nn.BatchNorm2d, ElementwiseAffine,
    Subsample,
)  # fmt: skip


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of one of the kinds and computes what that kind does, which a subclass may not."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _flat(model: nn.Module) -> list[nn.Module]:
    if _is(model, (nn.Sequential,)):
        assert isinstance(model, nn.Sequential)
        return [layer for child in model for layer in _flat(child)]
    if _is(model, (BasicBlock,)):
        assert isinstance(model, BasicBlock)
        body = nn.Sequential(model.conv1, model.bn1, model.relu1, model.conv2, model.bn2)
        return [Residual(body, model.shortcut), model.relu2]
    return [model]


def _part(layer: nn.Module) -> Affine | MaxPool | str | None:
    if _is(layer, (nn.Identity, nn.Dropout)):
        return None
    activations = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
    if type(layer) in activations:
        return activations[type(layer)]
    if _is(layer, AFFINE):
        if isinstance(layer, nn.Flatten) and layer.start_dim != 1:
            raise TypeError("interval bounds need nn.Flatten(1), which keeps the batch axis")
        if isinstance(layer, nn.Unflatten) and layer.dim in (0, "N"):
            raise TypeError("interval bounds need an nn.Unflatten that keeps the batch axis")
        return Affine(layer)
    if _is(layer, (nn.MaxPool2d,)):
        assert isinstance(layer, nn.MaxPool2d)
        return MaxPool(layer)
    raise TypeError(f"interval bounds for {type(layer).__name__} are not known; known: {', '.join(KNOWN)}")


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class Bounds:
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
        model: the network, in evaluation mode as far as bounds go; gradients flow to weights and boxes.
        box: of inputs.
        prop: rows to bound; without it the outputs themselves are.
        rounding: see `Bounds`.

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
            low, high, _ = _marked(part, (low, high), waiting, rounding)
        else:
            low, high = _step(part, low, high, rounding)
    return ranges, (low, high)


def _marked(mark: Mark, ends: Range, waiting: list[Range], rounding: float) -> tuple[Tensor, Tensor, Tensor | None]:
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


def _step(part: Affine | MaxPool | str, low: Tensor, high: Tensor, rounding: float) -> Range:
    """Intervals through one layer."""
    if isinstance(part, str):
        return ACTIVATIONS[part](low), ACTIVATIONS[part](high)
    if isinstance(part, MaxPool):
        return part.forward(low), part.forward(high)
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
    """Linear lower bounds, propagated backward from the property's rows; nowhere below the interval ones.

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
    ranges, terms = activation_ranges(layers, box, intermediate, verifier, rounding)
    found = row_bounds(layers, box, prop, ranges, terms, alpha_steps, rounding)
    cut = ibp(layers, box, prop, rounding=rounding)
    assert isinstance(cut, Bounds)
    return Bounds(torch.maximum(found.lower, cut.lower), found.A)


def row_bounds(
    layers: Layers, box: Box, prop: Property, ranges: dict[int, Range], terms: dict[int, Tensor], alpha_steps: int,
    rounding: float,
) -> Bounds:  # fmt: skip
    """Bounds of a property's rows from those of the inputs of activations; see `crown` and `activation_ranges`."""
    C, t = prop.C.to(box.lower), prop.t.to(box.lower)
    start = C.view(1, len(C), *layers.outputs)
    lower, coefficients, scale = linear_bounds(layers, len(layers.parts), start, ranges, box, terms=terms)
    lower = lower - rounding * (scale + t.abs())
    if alpha_steps:
        tuned = optimised_bounds(layers, start, ranges, box, alpha_steps, terms)
        if tuned is not None:
            value = tuned[0] - rounding * (tuned[2] + t.abs())
            better = value > lower
            lower = torch.where(better, value, lower)
            coefficients = torch.where(
                better.view(*better.shape, *[1] * (coefficients.dim() - 2)), tuned[1], coefficients
            )
    return Bounds(lower - t, coefficients)


def activation_ranges(
    layers: Layers, box: Box, intermediate: str, verifier: Crown | None, rounding: float = 0.0
) -> tuple[dict[int, Range], dict[int, Tensor]]:
    """Bounds of the inputs of every activation, by its place; of every affine layer what its outputs are summed from."""
    low, high = box.lower, box.upper
    found: dict[int, Range] = {}
    terms: dict[int, Tensor] = {}
    waiting: list[Range] = []
    for k, part in enumerate(layers.parts):
        if isinstance(part, Mark):
            low, high, sizes = _marked(part, (low, high), waiting, rounding)
            if sizes is not None:
                terms[k] = sizes
            continue
        if isinstance(part, Affine):
            if rounding:
                terms[k] = part.magnitude(low, high)
            low, high = _step(part, low, high, rounding)
            continue
        # Behind a single layer that mixes its inputs intervals are exact; behind an activation they are as good as those
        # of its inputs.
        sums = k > 0 and (isinstance(layers.parts[k - 1], Affine) or _joins(layers.parts[k - 1]))
        if intermediate == "crown" and sums and (found or sum(map(_mixes, layers.parts[:k])) > 1):
            low, high = _tightened(layers, k, low, high, found, box, terms, rounding)
        if verifier is not None:
            low, high = verifier.adjust(low, high)
        found[k] = low, high
        low, high = _step(part, low, high, 0.0)
    return found, terms


def _joins(part: Part) -> bool:
    return isinstance(part, Mark) and part.kind == "join"


def _mixes(part: Part) -> bool:
    return _joins(part) or (isinstance(part, Affine) and part.mixes)


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
        bound, scale = _back_by_windows(layers, k, stop, window, ranges, box, terms)
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


def _back_by_windows(
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
            window, constant, absolute = window.through(_lines(part, *ranges[i]), sizes)
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
                A, constant, absolute = _through(A, *_lines(part, *ranges[i], (alphas or {}).get(i)), sizes)
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

    Where the middle of the interval lies beyond the point of touch, the tangent there takes its place: it encloses the
    function more closely on the whole interval.

    The point of touch $p$ solves $f(p) - f(e) = f'(p) (p - e)$: Newton's steps, by halves where they leave the bracket.
    With any $p$ the line of slope $f'(p)$ that clears both $p$ and $e$ lies beyond the function, so that none needs to be
    exact.
    """
    kind = f is torch.tanh
    sign = torch.where(other > end, torch.ones_like(end), -torch.ones_like(end))
    at_end = f(end)
    near, far = torch.zeros_like(end), sign * other
    # p = |e| / 2 near 0, and grows like a logarithm far out.
    reach = end.abs() if kind else end.abs() / 2
    p = torch.minimum(torch.log1p(reach) * (0.5 if kind else 1.0), far)
    for _ in range(STEPS):
        z = sign * p
        y = f(z)
        first = 1 - y * y if kind else y * (1 - y)
        second = -2 * y * first if kind else first * (1 - 2 * y)
        gap = sign * (y - at_end - first * (z - end))  # above 0 beyond the point of touch
        far, near = torch.where(gap > 0, p, far), torch.where(gap > 0, near, p)
        rise = -second * (z - end)  # of the gap, by p
        newton = p - gap / torch.where(rise > 0, rise, torch.ones_like(rise))
        inside = (rise > 0) & (newton >= near) & (newton <= far)
        p = torch.where(inside, newton, (near + far) / 2)
    # Tangents at points further out clear the end as well; of those the one in the middle leaves the least area.
    z = sign * torch.maximum(p, sign * (end + other) / 2)
    slope = derivative(z)
    cuts = f(z) - slope * z, at_end - slope * end
    cut = torch.where(sign > 0, torch.maximum(*cuts), torch.minimum(*cuts))
    chord = (f(other) - at_end) / (other - end).where(other != end, torch.ones_like(end))
    touches = derivative(other) * (other - end).abs() < sign * (f(other) - at_end)
    return torch.where(touches, slope, chord), torch.where(touches, cut, at_end - chord * end)


def optimised_bounds(
    layers: Layers, start: Tensor, ranges: dict[int, Range], box: Box, steps: int, terms: dict[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The best of the bounds over slopes of unstable ReLUs, each row with its own, as `linear_bounds` gives them."""
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
            lower, A, scale = linear_bounds(layers, len(layers.parts), start, ranges, box, alphas, terms)
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


def matrix_of(part: Affine, shape: Sequence[int], box: Box) -> tuple[np.ndarray, np.ndarray]:
    """An affine layer as a matrix and a constant."""
    count = int(np.prod(shape))
    eye = torch.eye(count, dtype=torch.float64).view(count, *shape)
    constant = part.forward(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
    return (part.forward(eye).flatten(1) - constant).T.numpy(), constant[0].numpy()
