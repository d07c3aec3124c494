"""The times of a solve: outputs, jumps, and the grid of fixed steps."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import positive
from torchfolio.dynamics.solver import Solver
from torchfolio.dynamics.stepping import NEAR

__all__ = ["jump_times", "output_times", "step_grid"]


def _floats(name: str, values: Any) -> list[float]:
    if isinstance(values, Tensor):
        if values.requires_grad:
            warnings.warn(f"{name} wants a gradient, but solves are not differentiated in times", stacklevel=4)
        values = values.detach().double().reshape(-1).tolist() if values.dim() == 1 else values
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected {name} to be a sequence of times, got {values!r}") from error


def output_times(ts: Any) -> list[float]:
    """Times as numbers.

    Raises:
        ValueError: unless there are at least two, strictly rising or falling.
    """
    times = _floats("ts", ts)
    steps = [b - a for a, b in itertools.pairwise(times)]
    if not steps or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)) or not math.isfinite(sum(times)):
        raise ValueError(f"expected ts to be at least 2 strictly rising or falling times, got {_few(times)}")
    return times


def _few(times: Sequence[float]) -> str:
    text = ", ".join(f"{t:g}" for t in times[:6])
    return f"[{text}{', …' if len(times) > 6 else ''}]"


def jump_times(jump_ts: Any, times: Sequence[float], dtype: torch.dtype) -> dict[float, None]:
    """Jumps within the times, in their order; those that a field's clock cannot tell apart are one."""
    low, high = min(times[0], times[-1]), max(times[0], times[-1])
    jumps = sorted({t for t in _floats("jump_ts", jump_ts) if low <= t <= high}, reverse=times[0] > times[-1])
    if any(t != t for t in jumps):
        raise ValueError("expected jump_ts to be times, got nan")
    return dict.fromkeys(jumps)


def step_grid(times: list[float], dt: Any, grid: Any, jump_ts: Any, solver: Solver) -> list[float] | None:
    """Times of fixed steps, or None for adaptive ones."""
    t0, end = times[0], times[-1]
    if grid is not None:
        if dt is not None:
            raise ValueError("expected dt or grid, got both")
        points = output_times(grid)
        if points[0] != t0 or points[-1] != end:
            raise ValueError(f"expected grid from {t0:g} to {end:g} as ts, got {points[0]:g} to {points[-1]:g}")
    elif dt is not None:
        dt = positive("dt", float(dt))
        n = max(1, math.ceil(abs(end - t0) / dt - NEAR))
        points = [t0 + math.copysign(k * dt, end - t0) for k in range(n)] + [end]
    elif solver.error_order is None:
        points = list(times)
    else:
        return None
    direction = math.copysign(1.0, end - t0)
    jumps = [t for t in _floats("jump_ts", jump_ts) if 0 < (t - t0) * direction < (end - t0) * direction]
    return _snapped(points, times, jumps, direction)


def _snapped(points: list[float], times: Sequence[float], jumps: Sequence[float], direction: float) -> list[float]:
    """The grid with jumps put in, and with points that are times of outputs but for rounding moved onto them."""
    width = abs(points[-1] - points[0]) / (len(points) - 1)
    outputs = iter(times)
    output = next(outputs, None)
    snapped = []
    for t in points:
        while output is not None and (t - output) * direction > NEAR * width:
            output = next(outputs, None)
        snapped.append(output if output is not None and abs(t - output) <= NEAR * width else t)
    for t in jumps:
        k = min(range(len(snapped)), key=lambda k: abs(snapped[k] - t))
        if abs(snapped[k] - t) > NEAR * width:
            snapped.append(t)
        elif 0 < k < len(snapped) - 1:
            snapped[k] = t
    return sorted(set(snapped), reverse=direction < 0)
