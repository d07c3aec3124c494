"""Mean and covariance of a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StreamingMoments:
    """Mean and covariance of rows that arrive in batches, in float64, in one pass.

    Batches are merged by the pairwise update of Chan, Golub, LeVeque (1979), which does not cancel.

    Args:
        features: number of features; taken from the first batch if not given.
        covariance: also keep the covariance; otherwise only the variance of each feature.

    Raises:
        ValueError: on rows of another width, NaN, or statistics of too few rows.
    """

    def __init__(self, features: int | None = None, *, covariance: bool = True) -> None:
        self.features = features
        self.covariance_kept = covariance
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, x: Tensor) -> StreamingMoments:
        """Add rows `[N, ...]`, flattened to `[N, features]`."""
        rows = x.detach().flatten(1).double()
        if self.features is not None and rows.shape[1] != self.features:
            raise ValueError(f"expected rows of {self.features} features, got {rows.shape[1]}")
        if rows.isnan().any():
            raise ValueError("the rows hold NaN")
        if not len(rows):
            return self
        mean = rows.mean(0)
        centred = rows - mean
        scatter = centred.T @ centred if self.covariance_kept else centred.square().sum(0)
        self._merge(len(rows), mean, scatter)
        return self

    def merge(self, other: StreamingMoments) -> StreamingMoments:
        """Add what another stream has seen."""
        if other._mean is not None and other._scatter is not None:
            if self.covariance_kept != other.covariance_kept:
                raise ValueError("one stream keeps the covariance and the other does not")
            self._merge(other.count, other._mean, other._scatter)
        return self

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.features, self.count, self._mean, self._scatter = len(mean), count, mean, scatter
            return
        if len(mean) != self.features:
            raise ValueError(f"expected rows of {self.features} features, got {len(mean)}")
        difference = mean - self._mean
        total = self.count + count
        weight = self.count * count / total
        self._scatter = (
            self._scatter
            + scatter
            + weight * (torch.outer(difference, difference) if self.covariance_kept else difference.square())
        )
        self._mean = self._mean + difference * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """`[features]`, float64."""
        if self._mean is None:
            raise ValueError("expected at least one row, got none")
        return self._mean

    def variance(self, correction: int = 1) -> Tensor:
        """Variance of every feature, `[features]`."""
        scatter = self._scaled(correction)
        return scatter.diagonal() if self.covariance_kept else scatter

    def covariance(self, correction: int = 1) -> Tensor:
        """Covariance `[features, features]`, divided by `count - correction`."""
        if not self.covariance_kept:
            raise ValueError("this stream keeps variances alone; make it with covariance=True")
        return self._scaled(correction)

    def _scaled(self, correction: int) -> Tensor:
        if self._scatter is None or self.count <= correction:
            raise ValueError(f"expected more than {correction} row(s), got {self.count}")
        return self._scatter / (self.count - correction)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes back."""
        return {"count": self.count, "mean": self._mean, "scatter": self._scatter, "covariance": self.covariance_kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.count, self._mean, self._scatter = state["count"], state["mean"], state["scatter"]
        self.covariance_kept = state["covariance"]
        self.features = None if self._mean is None else len(self._mean)
