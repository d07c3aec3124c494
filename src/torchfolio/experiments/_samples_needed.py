"""Samples that naive Bayes and logistic regression need of a Gaussian mixture, by the number of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from torchfolio.adaptation.naive_bayes_probe import NaiveBayesProbe, gaussian_mixture, learning_curve, samples_to_reach

__all__ = ["log_slope", "samples_needed"]


def samples_needed(
    K: int, dimensions: tuple[int, ...], *, pool: int, test_points: int, points: int, seed: int
) -> dict[str, Any]:
    """Samples to come within 0.01 of the Bayes error, which is 0 to six digits from 50 features on.

    Args:
        K: number of classes.
        dimensions: numbers of features.
        pool: samples to draw from, as a multiple of the features.
        test_points: samples to test on.
        points: sizes of the grid.
        seed: random seed.

    Returns:
        `dimensions`, and for each the samples that `nb` and `lr` need; NaN where the pool is too small.
    """
    needed: dict[str, list[float]] = {"nb": [], "lr": []}
    for n in dimensions:
        m = pool * n
        X, y = gaussian_mixture(n, K, m + test_points, seed=seed)
        parts = X[:m], y[:m], X[m:], y[m:]
        sizes = sorted({round(size) for size in np.geomspace(2 * K, m, points)})
        curve = learning_curve(*parts, sizes, 10, {"nb": NaiveBayesProbe(scale=None)}, seed=seed)["nb"]
        needed["nb"].append(samples_to_reach(curve, 0.01) or np.nan)
        needed["lr"].append(np.nan)
        for size in sizes:  # one size at a time: none is fitted beyond the first that reaches the target
            lr = learning_curve(*parts, [size], 3, {"lr": LogisticRegression(max_iter=1000)}, seed=seed)["lr"]
            if samples_to_reach(lr, 0.01):
                needed["lr"][-1] = size
                break
    return {"dimensions": list(dimensions), **needed}


def log_slope(dimensions: Sequence[float], needed: Sequence[float]) -> float:
    """Slope of the samples against the features, in logarithms, over the four largest dimensions."""
    n, m = np.array(dimensions, dtype=float)[-4:], np.array(needed, dtype=float)[-4:]
    return float(np.polyfit(np.log(n), np.log(m), 1)[0])
