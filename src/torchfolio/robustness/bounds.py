"""Sound bounds on the outputs of small networks over boxes of inputs.

- `ibp`: interval bound propagation (Gowal et al., 2018), cheap, loose, differentiable;
- `crown`: linear bounds propagated backward (Zhang et al., NeurIPS 2018), optionally with optimised slopes (Xu et al.,
  "Fast and Complete", ICLR 2021).

What is decided with them is in `verifiers` and `relu_split`. Networks are (nested) `nn.Sequential`s of the layers in
`KNOWN`, taken in evaluation mode. Sums of two paths (`Residual`, the blocks of `models.ResNetCIFAR`) are known too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.robustness.affine_layers import Affine, ElementwiseAffine, Residual, matrix_of
from torchfolio.robustness.backward_bounds import linear_bounds
from torchfolio.robustness.interval_bounds import Bounds, Range, ibp, intervals
from torchfolio.robustness.layer_list import KNOWN, Layers, Mark
from torchfolio.robustness.preactivation_bounds import Adjust, activation_ranges
from torchfolio.robustness.properties import Box, Property

__all__ = [
    "KNOWN",
    "Affine",
    "Bounds",
    "ElementwiseAffine",
    "Layers",
    "Mark",
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


def crown(
    model: nn.Module | Layers,
    box: Box,
    prop: Property,
    *,
    intermediate: str = "crown",
    alpha_steps: int = 0,
    adjust: Adjust | None = None,
    rounding: float = 0.0,
) -> Bounds:
    """Linear lower bounds, propagated backward from the property's rows; nowhere below the interval ones.

    An activation with inputs in $[l, u]$ is enclosed by two lines; a row takes the lower one where its coefficient is
    not negative and the upper one elsewhere. For an unstable ReLU these are $\\alpha z$, $\\alpha = [u \\ge -l]$, and
    $\\frac{u}{u-l}(z - l)$; tanh and sigmoid get chords and tangents.

    Args:
        model: network.
        box: boxes of inputs.
        prop: rows to bound.
        intermediate: way in which the inputs of activations are bounded: `"crown"`, cut with intervals, or `"ibp"`.
        alpha_steps: steps of Adam (rate 0.25) on the slopes $\\alpha$ of unstable ReLUs, for the property's rows; the
            best bound is kept.
        adjust: function from lower and upper bounds of the inputs of an activation to those that are used instead.
        rounding: share by which bounds are lowered, see `Bounds`.
    """
    if intermediate not in ("crown", "ibp"):
        raise ValueError(f"expected intermediate to be 'crown' or 'ibp', got {intermediate!r}")
    layers = model if isinstance(model, Layers) else Layers(model, box.lower.shape[1:])
    ranges, terms = activation_ranges(layers, box, intermediate, adjust, rounding)
    backward = row_bounds(layers, box, prop, ranges, terms, alpha_steps, rounding)
    forward = ibp(layers, box, prop, rounding=rounding)
    assert isinstance(forward, Bounds)
    return Bounds(torch.maximum(backward.lower, forward.lower), backward.A)


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
        current = lower.detach(), A.detach(), scale.detach()
        if best is None:
            best = current
        else:
            better = current[0] > best[0]
            wide = better.view(*better.shape, *[1] * (A.dim() - 2))
            best = tuple(
                torch.where(w, new, old) for w, new, old in zip((better, wide, better), current, best, strict=True)
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
