"""The published way, a recursion of depth 100 and a solve, on whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchfolio.experiments._kernel_recursions import recursion
from torchfolio.experiments._sphere_classes import draw
from torchfolio.experiments.infinite_classifiers import predict


def peers(bench: Any) -> None:
    generator = np.random.default_rng(0)
    (X, y, _), (X_test, _, _) = (draw(1, 2000, generator) for _ in range(2))

    bench.compare(
        "fit and predict, 2,000 and 2,000 points on the circle",
        ours=lambda: predict("optimal", X, y, X_test),
        recursion_nngp=lambda: recursion(X, y, X_test, tangent=False),
        recursion_ntk=lambda: recursion(X, y, X_test, tangent=True),
    )
