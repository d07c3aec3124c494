"""Boundaries in many dimensions: images enlarged pixel by pixel, and a half-plane under noise in ever more pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchfolio.robustness.boundary_tilting import RidgePath

Array = NDArray[Any]


def of_many_pixels(
    X: Array, y: Array, X_test: Array, shape: tuple[int, ...], alpha: float, factors: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """Enlarged images, whose ridge grows with their size; and a half-plane under noise, in more and more pixels."""
    angles, changed, first = [], [], None
    keep = slice(0, 300)  # enlarged images are many numbers
    for k in factors:
        large, test = (_enlarged(part, shape, k) for part in (X[keep], X_test[keep]))
        path = RidgePath(large, y[keep], [k**2 * alpha])
        prediction = test @ path.coef_[0] + path.intercept_[0] > 0
        first = prediction if first is None else first
        angles.append(float(path.angles[0]))
        changed.append(int((prediction != first).sum()))
    sides, toy = (10, 20, 30), []
    for side in sides:
        rng = np.random.default_rng(seed)
        y = np.arange(10 * side**2) % 2
        pattern = np.repeat(np.where(np.arange(side) < side // 2, 1.0, -1.0)[None], side, 0).ravel()
        X = (2.0 * y - 1)[:, None] * pattern + 0.5 * rng.standard_normal((len(y), side**2))
        toy.append(float(RidgePath(X, y, [1.0]).angles[0]))
    return {"sides": list(sides), "enlarged_angles": angles, "changed_predictions": changed, "toy_angles": toy}


def _enlarged(X: Array, shape: tuple[int, ...], k: int) -> Array:
    return X.reshape(-1, *shape).repeat(k, -1).repeat(k, -2).reshape(len(X), -1)
