"""Mean and covariance of a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.shown import Shown

_ROWS = 65_536  # rows turned into float64 at a time


class StreamingMoments(Shown):
    """Mean and covariance of rows that arrive in batches, in float64, in one pass.

    With the count $n$, the mean $\\mu$ and the scatter $S = \\sum_i (x_i - \\mu)(x_i - \\mu)^\\top$ of two
    parts and $\\delta = \\mu_b - \\mu_a$,

    $$\\mu = \\mu_a + \\frac{n_b}{n}\\,\\delta, \\qquad S = S_a + S_b + \\frac{n_a
    n_b}{n}\\,\\delta\\delta^\\top,$$

    which does not cancel as $\\mathbb{E}[x x^\\top] - \\mu\\mu^\\top$ does. The covariance of two layers, or
    two networks, is a block of the covariance of their features side by side.

    Args:
        features: number of features; taken from the first batch if not given.
        covariance: whether to keep the covariance too; otherwise only the variance of each feature.

    Raises:
        ValueError: from the methods, on rows of another width, values that are not finite, or too few rows.

    Reference:
        Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
        1979.
    """

    def __init__(self, features: int | None = None, *, covariance: bool = True) -> None:
        self.features = features
        self.covariance_kept = covariance
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, x: Tensor) -> StreamingMoments:
        """Add the rows `[N, ...]`, flattened to `[N, features]`; they stay on their device.

        For one row per position of a feature map `[N, C, H, W]`, pass `x.movedim(1, -1).flatten(0, -2)`.
        """
        if x.dim() == 0:
            raise ValueError("expected rows [N, ...], got a single number")
        rows = x.detach().flatten(1) if x.dim() > 1 else x.detach()[:, None]
        if self.features is not None and rows.shape[1] != self.features:
            raise ValueError(f"expected rows of {self.features} features, got {rows.shape[1]}")
        if rows.device.type == "mps":  # has no float64
            rows = rows.cpu()
        if not rows.sum(dtype=torch.float64).isfinite():
            raise ValueError("the rows hold values that are not finite")
        for part in rows.split(_ROWS):
            if len(part):
                self._add(part)
        return self

    def _add(self, rows: Tensor) -> None:
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        scatter = centred.T @ centred if self.covariance_kept else centred.square().sum(0)
        self._merge(len(rows), mean, scatter)

    def merge(self, other: StreamingMoments) -> StreamingMoments:
        """Add what another stream, of other rows of the same features, has seen."""
        if self.covariance_kept != other.covariance_kept:
            raise ValueError("one stream keeps the covariance and the other does not")
        if other._mean is not None and other._scatter is not None:
            self._merge(other.count, other._mean.clone(), other._scatter.clone())
        return self

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.features is not None and len(mean) != self.features:
            raise ValueError(f"expected rows of {self.features} features, got {len(mean)}")
        if self._mean is None or self._scatter is None:
            self.features, self.count, self._mean, self._scatter = len(mean), count, mean, scatter
            return
        difference = mean.to(self._mean.device) - self._mean
        total = self.count + count
        between = torch.outer(difference, difference) if self.covariance_kept else difference.square()
        self._scatter = self._scatter + scatter.to(self._scatter.device) + between * (self.count * count / total)
        self._mean = self._mean + difference * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """`[features]`, float64."""
        if self._mean is None:
            raise ValueError("expected at least one row, got none")
        return self._mean

    def variance(self, correction: int = 1) -> Tensor:
        """Variance of every feature, `[features]`, divided by `count - correction`."""
        scatter = self._scaled(correction)
        return scatter.diagonal() if self.covariance_kept else scatter

    def covariance(self, correction: int = 1) -> Tensor:
        """Covariance `[features, features]`, divided by `count - correction`."""
        self._need_covariance()
        return self._scaled(correction)

    def correlation(self) -> Tensor:
        """Correlations `[features, features]`; rows and columns of constant features are NaN, as in numpy."""
        self._need_covariance()
        scatter = self._scaled(1)
        deviation = scatter.diagonal().sqrt()
        return (scatter / deviation / deviation[:, None]).clamp(-1, 1)

    def _need_covariance(self) -> None:
        if not self.covariance_kept:
            raise ValueError("this stream keeps variances alone; make it with covariance=True")

    def _scaled(self, correction: int) -> Tensor:
        if self._scatter is None or self.count <= correction:
            raise ValueError(f"expected more than {correction} row(s), got {self.count}")
        return self._scatter / (self.count - correction)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes back."""
        return {
            "count": self.count,
            "mean": self._mean,
            "scatter": self._scatter,
            "covariance": self.covariance_kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.count, self._mean, self._scatter = state["count"], state["mean"], state["scatter"]
        self.covariance_kept = state["covariance"]
        self.features = None if self._mean is None else len(self._mean)
