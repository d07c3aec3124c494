"""How well a hidden polynomial was learned, and errors over dimensions and numbers of samples.

Part of Wang et al., "Learning Hierarchical Polynomials with Three-Layer Neural Networks", ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchfolio.theory.hierarchical_target import HierarchicalPolynomial

__all__ = ["FeatureRecovery", "feature_recovery", "sample_complexity"]


class FeatureRecovery(NamedTuple):
    """How well a feature is the hidden polynomial.

    Attributes:
        correlation: correlation of f with p, times the sign of $g_1$: 1 if the network found p.
        target_correlation: correlation of h itself with p, in absolute value.
        feature: f at the inputs, scaled by regression on p's scale and sign `[n]`.
        hidden: p at the inputs `[n]`.
    """

    correlation: float
    target_correlation: float
    feature: np.ndarray
    hidden: np.ndarray


def feature_recovery(model: Any, target: HierarchicalPolynomial, X: Tensor) -> FeatureRecovery:
    """Compare what the first stage learned with the hidden polynomial.

    Args:
        model: a fitted `LayerwiseThreeLayerRegressor`, or anything with `feature_(X)`.
        target: function that it was trained on.
        X: inputs `[n, d]`.
    """
    x = torch.as_tensor(X, dtype=torch.float64)
    f, p, h = np.asarray(model.feature_(x.numpy())), target.p(x).numpy(), target(x).numpy()
    sign = 1.0 if float(target.link[1]) >= 0 else -1.0
    deviation = f.std()
    aligned = sign * (f - f.mean()) / (deviation if deviation > 0 else 1.0)
    return FeatureRecovery(sign * _correlation(f, p), abs(_correlation(h, p)), aligned, p)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() <= 1e-12 * max(1.0, abs(a.mean())) or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def sample_complexity(
    d_list: Sequence[int],
    n_list: Sequence[int],
    target: Callable[[int], HierarchicalPolynomial],
    models: dict[str, Callable[[int, int], Any]],
    *,
    n_test: int = 5000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Test errors over dimensions and numbers of samples.

    Args:
        d_list: dimensions.
        n_list: numbers of all training samples.
        target: function from d to the target, such as `HierarchicalPolynomial`.
        models: functions by name, each from d and n to a regressor that has not been fitted.
        n_test: fresh samples to test on.
        seed: seed of the samples.

    Returns:
        A row for each: `d`, `n`, `n/d^k`, `n/d^kq`, `model`, `test_mse_rel` (mean squared error over the targets'
        variance) and `corr` (of the feature with p; NaN for models without one). `pandas.DataFrame` takes them.
    """
    rows = []
    for d in d_list:
        truth = target(d)
        q = len(truth.link) - 1
        x_test, y_test = truth.sample(n_test, seed=seed + 1)
        for n in n_list:
            x, y = truth.sample(n, seed=seed)
            for name, make in models.items():
                model = make(d, n).fit(x.numpy(), y.numpy())
                error = float(np.mean((model.predict(x_test.numpy()) - y_test.numpy()) ** 2) / y_test.numpy().var())
                learned = hasattr(model, "feature_")
                corr = feature_recovery(model, truth, x_test).correlation if learned else math.nan
                scale = {"n/d^k": n / d**truth.k, "n/d^kq": n / d ** (truth.k * q)}
                rows.append({"d": d, "n": n, **scale, "model": name, "test_mse_rel": error, "corr": corr})
    return rows
