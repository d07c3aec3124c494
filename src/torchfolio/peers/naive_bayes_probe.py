"""Fitting a head beside scikit-learn's, and a learning curve beside loops of fits."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.naive_bayes import GaussianNB

from torchfolio.adaptation.naive_bayes_probe import NaiveBayesProbe, learning_curve
from torchfolio.experiments.naive_bayes_probe import digits


def peers(bench: Any) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((20_000, 256)), rng.integers(10, size=20_000)
    bench.compare(
        "fit 20,000 x 256, 10 classes",
        ours=lambda: NaiveBayesProbe().fit(features, labels),
        gaussian_nb=lambda: GaussianNB().fit(features, labels),
    )
    X, y, X_test, y_test = digits(0)
    sizes = [20, 30, 50, 100, 200, 400, 800]

    def loop(head: Any) -> list[float]:
        draw = np.random.default_rng(0)
        rows = [draw.choice(len(X), m, replace=False) for m in sizes for _ in range(20)]
        return [head.fit(X[r], y[r]).score(X_test, y_test) for r in rows]

    bench.compare(
        "learning curve on digits, 7 sizes of 20 subsets",
        ours=lambda: learning_curve(X, y, X_test, y_test, sizes, 20, {"nb": NaiveBayesProbe()}),
        gaussian_nb=lambda: loop(GaussianNB()),
        own_loop=lambda: loop(NaiveBayesProbe()),
    )
