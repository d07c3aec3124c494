"""A line below and one above an activation on an interval of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "lines"]

STEPS = 6
"""Newton's steps to the point where a line touches tanh or sigmoid."""


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def lines(kind: str, low: Tensor, high: Tensor, alpha: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _tangent_from(f, derivative, end: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
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
