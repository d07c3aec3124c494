"""Two classes on a sphere, images of two Dirichlet distributions on the simplex, so that the Bayes rule is known."""

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
