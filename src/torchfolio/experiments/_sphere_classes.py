"""Two classes on a sphere whose Bayes rule is known: images of Dirichlet distributions, and two clusters of a circle."""

from __future__ import annotations

import numpy as np
from scipy.stats import dirichlet

PRIOR = (0.4, 0.6)
# Parameters of the two classes' Dirichlet distributions, by the dimension of the sphere.
DIRICHLET = {
    1: ((1, 2), (2, 1)),
    2: ((0.5, 0.5, 2.5), (2.5, 0.1, 0.5)),
    4: ((3, 1, 2, 1, 1), (1, 2, 2, 2, 3)),
    8: ((1, 2, 1, 2, 1, 1, 1, 1, 1), (1, 1, 1, 2, 3, 4, 2, 2, 1)),
}


def draw(dim: int, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points on the sphere, labels, and what the Bayes rule says."""
    y = (generator.random(n) >= PRIOR[0]).astype(int)
    first, second = (generator.dirichlet(alpha, n) for alpha in DIRICHLET[dim])
    simplex = np.where(y[:, None] == 1, second, first).clip(1e-12)
    # A point of the sphere and one of the simplex determine each other: their likelihood ratio is the same.
    density = [p * dirichlet.pdf(simplex.T / simplex.sum(1), a) for p, a in zip(PRIOR, DIRICHLET[dim], strict=True)]
    return simplex / np.linalg.norm(simplex, axis=1, keepdims=True), y, (density[1] > density[0]).astype(int)


def two_clusters(n: int, test_size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points and labels of a large cluster, mostly positive, and a small one, mostly negative; test points of this."""
    large = generator.random(n) < 0.9
    angle = np.where(large, generator.uniform(0, 0.6, n), generator.uniform(1.2, 1.5, n))
    y = (generator.random(n) < np.where(large, 0.9, 0.3)).astype(int)
    inside = generator.uniform(1.2, 1.5, test_size)
    X, X_test = (np.stack([np.cos(a), np.sin(a)], 1) for a in (angle, inside))
    return X, y, X_test
