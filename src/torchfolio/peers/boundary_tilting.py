"""A path of 50 beside a loop of scikit-learn's ridge classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import RidgeClassifier

from torchfolio.robustness.boundary_tilting import RidgePath


def peers(bench: Any) -> None:
    from torchfolio.data import load

    x, y = load("mnist10k", val=0, normalize=False).train.tensors
    pair = (y == 3) | (y == 7)
    X, labels = x[pair].flatten(1).double().numpy(), y[pair].numpy()
    alphas = np.logspace(6, -5, 50)
    bench.compare(
        "path of 50, MNIST 3 and 7, 1,706 x 784",
        repeats=3,
        ours=lambda: RidgePath(X, labels, alphas),
        ridge_classifier=lambda: [RidgeClassifier(alpha=len(X) * a).fit(X, labels) for a in alphas],
    )
