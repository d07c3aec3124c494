"""Weights of fitted linear classifiers between any two of their classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from torchfolio.checks import whole

__all__ = ["places", "weights"]

Array = NDArray[np.float64]


def places(model: Any, classes: tuple[Any, Any]) -> tuple[int, int]:
    """Places of two labels among a classifier's classes."""
    if isinstance(model, nn.Linear):
        a, b = (whole("a class of nn.Linear", c, 0, max(1, model.out_features - 1)) for c in classes)
        return a, b
    known = getattr(model, "classes_", None)
    if known is None:
        raise TypeError(f"expected a fitted classifier, a layer or a network, got {type(model).__name__}")
    rows = [np.flatnonzero(np.asarray(known) == c) for c in classes]
    missing = next((c for c, place in zip(classes, rows, strict=True) if not len(place)), None)
    if missing is not None:
        raise ValueError(f"expected classes among {np.asarray(known)}, got {missing!r}")
    return int(rows[0][0]), int(rows[1][0])


def weights(model: Any, X: Array, a: int, b: int) -> tuple[Array, float]:
    """Weights and bias of a linear classifier that is positive where class b wins over class a."""
    if isinstance(model, nn.Linear):
        weight, bias = model.weight.detach(), model.bias
        W = weight.double().cpu().numpy()
        B = np.zeros(len(W)) if bias is None else bias.detach().double().cpu().numpy()
        return _difference(W, B, a, b)
    if not callable(getattr(model, "decision_function", None)):
        raise TypeError(f"expected a classifier with a decision function, got {type(model).__name__}")
    K, coef = len(model.classes_), getattr(model, "coef_", None)
    if isinstance(coef, np.ndarray):
        W, B = np.atleast_2d(coef), np.broadcast_to(np.ravel(model.intercept_), len(np.atleast_2d(coef)))
        if _one_against_one(model):  # a row for each pair of classes, positive for the first of them (if K > 2)
            rows = [(p, q) for p in range(K) for q in range(p + 1, K)]
            sign = 1.0 if K == 2 else -1.0
            row = rows.index((min(a, b), max(a, b)))
            sign = sign if a < b else -sign
            return sign * W[row], float(sign * B[row])
        if len(W) in (1, K):
            return _difference(W, B, a, b)
    # A pipeline, or something that wraps a linear classifier: read the weights off its decision function.
    d = X.shape[1]
    points = np.vstack([np.zeros((1, d)), np.eye(d)])
    values = np.asarray(model.decision_function(points), dtype=np.float64).reshape(d + 1, -1)
    W, B = (values[1:] - values[0]).T, values[0]
    expected, got = X @ W.T + B, np.asarray(model.decision_function(X), dtype=np.float64).reshape(len(X), -1)
    if W.shape[0] not in (1, K) or not np.allclose(got, expected, rtol=1e-5, atol=1e-6 * np.abs(got).max()):
        raise TypeError(
            f"expected a linear classifier, the decision function of {type(model).__name__} is not linear in X"
        )
    return _difference(W, B, a, b)


def _one_against_one(model: Any) -> bool:
    from sklearn.svm import SVC, NuSVC

    return isinstance(model, SVC | NuSVC)


def _difference(W: Array, B: Array, a: int, b: int) -> tuple[Array, float]:
    """Of the rows of two classes; one row stands for two classes and is positive for the second."""
    if len(W) == 1:
        sign = 1.0 if a < b else -1.0
        return sign * W[0], float(sign * B[0])
    if max(a, b) >= len(W):
        raise ValueError(f"expected classes from 0 to {len(W) - 1}, got {max(a, b)}")
    return W[b] - W[a], float(B[b] - B[a])
