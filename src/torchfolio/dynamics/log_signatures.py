"""Log-signatures of windows of a series, by which long series are solved in few steps (the log-ODE method)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchfolio.checks import whole
from torchfolio.dynamics.controls import fill_missing

__all__ = ["log_signatures"]


def log_signatures(
    x: Tensor, t: Tensor | Sequence[float] | None = None, window: int = 8, *, append_time: bool = True
) -> tuple[Tensor, Tensor]:
    """Summarise a long series by its log-signatures of depth 2 over windows, summed up from window to window.

    Each window from t_i to t_j gives the increments of all channels and, for each pair, the area between the path and
    its chord:

        X(t_j) - X(t_i),    A_kl = ½ ∫ (X_k - X_k(t_i)) dX_l - (X_l - X_l(t_i)) dX_k    for k < l

    A controlled equation driven by straight lines through these sums, with a field of as many columns, is the log-ODE
    method: it takes steps as long as a window and still sees in which order channels moved. Use it as the series of a
    `NeuralCDE` with `control=LinearControl` and `append_time=False`, where the first value keeps z(t_0) depending on the
    start.

    Args:
        x: series `[N, ..., c]`, N at least 2, NaN where a value is missing (lines are drawn through those).
        t: times `[N]`, strictly rising; 0, 1, 2, … if None.
        window: number of intervals of a window, at least 1; the last window may have fewer.
        append_time: whether time becomes the first channel.

    Shapes:
        With c channels, time included, series `[M + 1, ..., c + c (c - 1) / 2]` and times `[M + 1]`, where M is the number of
        windows. The first row is the first value of x with areas of 0; gradients reach x.

    Raises:
        TypeError: if the series is no tensor in floating point.
        ValueError: if it has another shape, times do not rise, or the window is below 1.

    Reference:
        Morrill, Salvi, Kidger, Foster, Neural Rough Differential Equations for Long Time Series, ICML 2021 (arXiv
        2009.08295); Kidger, arXiv 2202.02435, section 3.2.

    >>> long = torch.randn(101, 5, 2).cumsum(0)
    >>> short, times = log_signatures(long, window=20)
    >>> short.shape, times.tolist()
    (torch.Size([6, 5, 6]), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("expected a series [N, ..., channels] of tensors in floating point")
    if x.dim() < 2 or len(x) < 2 or not x.numel():
        raise ValueError(f"expected a series [N, ..., channels] with N of at least 2, got shape {tuple(x.shape)}")
    times = torch.arange(len(x)) if t is None else torch.as_tensor(t)
    times = times.detach().to(x)
    if times.shape != (len(x),) or not bool((times.diff() > 0).all()):
        raise ValueError(f"expected {len(x)} strictly rising times, got shape {tuple(times.shape)}")
    if bool(x.detach().isinf().any()):
        raise ValueError("expected a series without infinite values; NaN marks missing ones")
    window = whole("window", window, 1)
    path = fill_missing(x, times)
    if append_time:
        stamps = times.view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)
        path = torch.cat([stamps, path], -1)
    c = path.shape[-1]
    rows, columns = torch.triu_indices(c, c, 1, device=x.device)
    ends = [*range(0, len(path) - 1, window), len(path) - 1]
    areas = [torch.zeros_like(path[0, ..., rows])]
    for first, last in zip(ends, ends[1:], strict=False):
        steps = path[first : last + 1].diff(dim=0)
        # On a straight piece the integral of X - X(t_i) is its value at the middle.
        middle = path[first:last] - path[first] + steps / 2
        area = (middle[..., rows] * steps[..., columns] - middle[..., columns] * steps[..., rows]).sum(0) / 2
        areas.append(areas[-1] + area)
    index = torch.tensor(ends, device=x.device)
    return torch.cat([path[index], torch.stack(areas)], -1), times[index]
