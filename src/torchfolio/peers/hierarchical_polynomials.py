"""At equal test error: the network from 3,000 samples, choosing its decays, the degree-4 kernel from 8,000 with one."""

from __future__ import annotations

from typing import Any

from torchfolio.theory.hierarchical_polynomials import HierarchicalPolynomial, LayerwiseThreeLayerRegressor


def peers(bench: Any) -> None:
    from sklearn.kernel_ridge import KernelRidge

    X, y = (part.numpy() for part in HierarchicalPolynomial(24).sample(8000))
    ours = LayerwiseThreeLayerRegressor(m2=1000, random_state=0)
    kernel = KernelRidge(kernel="poly", degree=4, gamma=1 / 24, coef0=1, alpha=1)
    bench.compare(
        "fit to a test error of about 0.4",
        repeats=3,
        ours=lambda: ours.fit(X[:3000], y[:3000]),
        sklearn_kernel_ridge=lambda: kernel.fit(X, y),
    )
