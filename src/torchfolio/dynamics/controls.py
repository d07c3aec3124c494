"""Paths through time series: what drives a neural controlled differential equation.

Time is the first axis of the data, then any batch axes, then channels. NaN marks values that are missing, each channel
by itself.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import one_of
from torchfolio.shown import Shown

__all__ = ["Control", "HermiteControl", "LinearControl", "NaturalCubicControl", "RectilinearControl", "fill_missing"]


def fill_missing(x: Tensor, t: Tensor) -> Tensor:
    """Put straight lines through missing values (NaN), and the nearest value at the ends.

    Args:
        x: series `[N, ..., c]`.
        t: times `[N]`.

    Returns:
        the series without NaN. A channel that was never observed is 0, with a warning; another one is given where a
        first value is missing, since what is put there comes from the future.
    """
    seen = ~x.isnan()
    if bool(seen.all()):
        return x
    n = len(x)
    if not bool(seen[0].all()):
        never = int((~seen.any(0)).sum())
        text = (
            f"first values are missing in {int((~seen[0]).sum())} channels of series; the first observed ones stand in"
        )
        warnings.warn(text + (f", and 0 in {never} that were never observed" if never else ""), stacklevel=3)
    index = torch.arange(n, device=x.device).view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    before = torch.where(seen, index, -1).cummax(0).values
    after = torch.where(seen, index, n).flip(0).cummin(0).values.flip(0)
    low = torch.where(before < 0, after, before).clamp(0, n - 1)
    high = torch.where(after == n, before, after).clamp(0, n - 1)
    clean = torch.where(seen, x, 0.0)
    span = t[high] - t[low]
    share = torch.where(span > 0, (t.view(-1, *[1] * (x.dim() - 1)) - t[low]) / torch.where(span > 0, span, 1), 0.0)
    return torch.lerp(clean.gather(0, low), clean.gather(0, high), share.to(x.dtype))


class Control(Shown, ABC):
    """A path of cubic pieces, X(t_i + s) = a_i + b_i s + c_i s² + d_i s³.

    Args:
        x: series `[N, ..., c]`, N at least 2; NaN where a value is missing.
        t: times `[N]`, strictly rising; 0, 1, 2, … if None.
        append_time: whether time becomes the first channel. A controlled equation sees neither speed nor the time that
            passes between observations without it.
        append_mask: whether each channel's number of observations so far becomes a channel too, divided by N.

    Attributes:
        knots: times at which pieces meet.
        coefficients: coefficients of rising powers `[2 or 4, N - 1, ..., c]`.
        jumps: knots at which the slope jumps.

    Raises:
        TypeError: if the series is no tensor in floating point.
        ValueError: if it has another shape, or times do not rise.
    """

    smooth = False
    online = True

    def __init__(
        self,
        x: Tensor,
        t: Tensor | Sequence[float] | None = None,
        *,
        append_time: bool = True,
        append_mask: bool = False,
    ) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError("expected a series [N, ..., channels] of tensors in floating point")
        if x.dim() < 2 or len(x) < 2 or not x.numel():
            raise ValueError(f"expected a series [N, ..., channels] with N of at least 2, got shape {tuple(x.shape)}")
        t = torch.arange(len(x)) if t is None else torch.as_tensor(t)
        t = t.detach().to(x)
        if t.shape != (len(x),) or not bool((t.diff() > 0).all()):
            raise ValueError(f"expected {len(x)} strictly rising times, got shape {tuple(t.shape)}")
        if bool(x.detach().isinf().any()):
            raise ValueError("expected a series without infinite values; NaN marks missing ones")
        self.append_time, self.append_mask = append_time, append_mask
        counts = (~x.isnan()).to(x.dtype).cumsum(0) / len(x) if append_mask else None
        knots, path = self._path(self._filled(x, t), t, counts)
        # One tensor, so that a solve has one parameter whose gradient leads to the data.
        self.coefficients = torch.stack(self._pieces(path, knots))
        self.knots = knots.tolist()
        self.t0, self.t1 = self.knots[0], self.knots[-1]

    @staticmethod
    def from_data(
        x: Tensor, t: Tensor | Sequence[float] | None = None, kind: str = "hermite", **options: Any
    ) -> Control:
        """Control of a kind: "hermite", "linear", "rectilinear" or "natural_cubic"."""
        kinds = {
            "hermite": HermiteControl,
            "linear": LinearControl,
            "rectilinear": RectilinearControl,
            "natural_cubic": NaturalCubicControl,
        }
        return kinds[one_of("kind", kind, kinds)](x, t, **options)

    @property
    def jumps(self) -> list[float]:
        return [] if self.smooth else self.knots[1:-1]

    @property
    def channels(self) -> int:
        """Number of channels, time and counts included."""
        return self.coefficients.shape[-1]

    def evaluate(self, t: Tensor | float) -> Tensor:
        """X(t) `[..., c]`."""
        i, s = self._locate(t)
        *lower, total = self.coefficients[:, i].unbind(0)
        for coefficient in reversed(lower):
            total = total * s + coefficient
        return total

    def derivative(self, t: Tensor | float) -> Tensor:
        """X'(t) `[..., c]`; at a jump that after it."""
        i, s = self._locate(t)
        _, *rising = self.coefficients[:, i].unbind(0)
        total = rising[-1] * len(rising)
        for power in range(len(rising) - 1, 0, -1):
            total = total * s + rising[power - 1] * power
        return total

    def _locate(self, t: Tensor | float) -> tuple[int, float]:
        time = float(t)
        i = min(max(bisect_right(self.knots, time) - 1, 0), len(self.knots) - 2)
        return i, time - self.knots[i]

    def _filled(self, x: Tensor, t: Tensor) -> Tensor:
        return fill_missing(x, t)

    def _path(self, x: Tensor, t: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Knots, and the path's values at them."""
        time = t.view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)
        parts = [time] * self.append_time + [x] + ([counts] if counts is not None else [])
        return t, torch.cat(parts, -1)

    @abstractmethod
    def _pieces(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Coefficients `[N - 1, ..., c]` of rising powers."""


def _column(v: Tensor, x: Tensor) -> Tensor:
    return v.view(-1, *[1] * (x.dim() - 1))


class LinearControl(Control):
    """Straight lines through the observations."""

    def _pieces(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return x[:-1], x.diff(dim=0) / _column(t.diff(), x)


class HermiteControl(Control):
    """Cubics through the observations whose slope at each knot is that of the line before it.

    Smooth, and the path up to a knot does not depend on later observations (unless values are missing: lines are drawn
    through those first). With d_i the slopes of the lines and δ = d_i - d_(i-1):

        X = x_i + d_(i-1) s + 2 (δ / Δ_i) s² - (δ / Δ_i²) s³

    Reference:
        Morrill et al., "On the Choice of Interpolation Scheme for Neural CDEs", arXiv 2106.11028.
    """

    smooth = True

    def _pieces(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        width = _column(t.diff(), x)
        slopes = x.diff(dim=0) / width
        before = torch.cat([slopes[:1], slopes[:-1]])
        bend = (slopes - before) / width
        return x[:-1], before, 2 * bend, -bend / width


class RectilinearControl(Control):
    """Steps: time advances while values are held, then values are updated while time stands still.

    Nothing at a time depends on later observations, so it suits decisions made online. The path is parameterised by its
    index: it runs from 0 to 2N - 2 and observation i is complete at 2i. Missing values are held.

    Raises:
        ValueError: if time is no channel.
    """

    def _filled(self, x: Tensor, t: Tensor) -> Tensor:
        index = torch.where(x.isnan(), 0, torch.arange(len(x), device=x.device).view(-1, *[1] * (x.dim() - 1)))
        held = x.gather(0, index.cummax(0).values)
        return fill_missing(held, t)  # only what comes before the first observation is left

    def _path(self, x: Tensor, t: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.append_time:
            raise ValueError("expected append_time=True for a rectilinear control: without it, time would not advance")
        values = x if counts is None else torch.cat([x, counts], -1)
        times = _column(t, x).expand(*x.shape[:-1], 1).repeat_interleave(2, 0)[1:]
        path = torch.cat([times, values.repeat_interleave(2, 0)[:-1]], -1)
        return torch.arange(len(path), dtype=x.dtype, device=x.device), path

    def _pieces(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return x[:-1], x.diff(dim=0)


class NaturalCubicControl(Control):
    """The natural cubic spline: smoothest, but each piece depends on all observations, later ones too.

    Lines are drawn through missing values first.
    """

    smooth, online = True, False

    def _pieces(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        width = t.diff()
        h = _column(width, x)
        slopes = x.diff(dim=0) / h
        # Second derivatives m: h_(i-1) m_(i-1) + 2 (h_(i-1) + h_i) m_i + h_i m_(i+1) = 6 (slope_i - slope_(i-1)).
        right, w = [6 * v for v in slopes.diff(dim=0)], width.tolist()
        diagonal = [2 * (a + b) for a, b in zip(w, w[1:], strict=False)]
        for i in range(1, len(right)):
            factor = w[i] / diagonal[i - 1]
            diagonal[i] -= factor * w[i]
            right[i] = right[i] - factor * right[i - 1]
        m = [torch.zeros_like(x[0])]
        for i in range(len(right) - 1, -1, -1):
            m.append((right[i] - w[i + 1] * m[-1]) / diagonal[i])
        m = torch.stack([torch.zeros_like(x[0]), *reversed(m)])
        return x[:-1], slopes - h * (2 * m[:-1] + m[1:]) / 6, m[:-1] / 2, m.diff(dim=0) / (6 * h)
