"""Courses of layer-wise training on small hierarchical polynomials: over samples, weight decay and gradient steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchfolio.runs import Results
from torchfolio.theory.hierarchical_polynomials import (
    HierarchicalPolynomial,
    LayerwiseThreeLayerRegressor,
    SpectralDescent,
    ThreeLayerNetwork,
    TunedKernelRidge,
    sample_complexity,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def first_stage(settings: Any, seed: int) -> dict[str, Any]:
    """The first stage over weight decay and over gradient steps, all from one eigendecomposition."""
    d = settings.small_d[-1]
    target, n = HierarchicalPolynomial(d, seed=seed), settings.small_n[-1] * d**2
    X, y = target.sample(n, seed=2 * seed)
    X_test, y_test = target.sample(settings.n_test, seed=2 * seed + 1)
    network = ThreeLayerNetwork(d, 1, settings.small_m2).double()
    with torch.no_grad():
        features, test = (network.activation(network.inner(x)) for x in (X, X_test))
    mean = features.mean(0)
    spectrum = SpectralDescent(features - mean, y - y.mean())
    decays = torch.logspace(-7, 0, 22, dtype=torch.float64)
    weights = {
        "decay": spectrum.weights(decays * spectrum.top),
        "steps": torch.stack([spectrum.weights(0.0, T) for T in settings.steps], -1),
    }
    result: dict[str, Any] = {"decays": decays}
    for name, u in weights.items():
        f, p = (test - mean) @ u, target.p(X_test)
        result[f"error over {name}"] = (f + y.mean() - y_test[:, None]).square().mean(0) / y_test.var()
        result[f"correlation over {name}"] = torch.corrcoef(torch.cat([p[None], f.T]))[0, 1:]
    return result


def over_samples(settings: Any, seed: int) -> dict[str, Any]:
    """Errors over dimension and samples, of the network and of a kernel."""
    models = {
        "network": lambda d, n: LayerwiseThreeLayerRegressor(settings.m1, settings.small_m2, random_state=seed),
        "kernel": lambda d, n: TunedKernelRidge(4),
    }
    rows: list[dict[str, Any]] = []
    for d in settings.small_d:
        sizes = [2 * ratio * d**2 for ratio in settings.small_n]
        rows += sample_complexity([d], sizes, lambda d: HierarchicalPolynomial(d, seed=seed), models, seed=2 * seed)
    return {f"{name} {d}": [r["test_mse_rel"] for r in rows if (r["model"], r["d"]) == (name, d)]
            for name in models for d in settings.small_d}  # fmt: skip


def drawn_over_samples(results: Results) -> Figure:
    """Errors by samples in units of $d^2$, in which the network's meet, and of $d^4$, in which the kernel's do."""
    import matplotlib.pyplot as plt

    s = results.settings
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for ax, power in zip(axes, (2, 4), strict=True):
        for name, style in (("network", "-o"), ("kernel", "--s")):
            for k, d in enumerate(s.small_d):
                n = 2 * np.asarray(s.small_n) * d**2
                ax.loglog(n / d**power, results.values("curves", f"{name} {d}").mean(0), style, c=f"C{k}",
                          label=f"{name}, d = {d}")  # fmt: skip
        ax.set(xlabel=f"samples / $d^{power}$", ylabel="test error / variance")
        ax.legend(fontsize=8)
    return fig


def drawn_first_stage(results: Results) -> Figure:
    """Error and correlation of the first stage over weight decay and over gradient steps."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    places = {"decay": results.arms[0]["path"]["decays"], "steps": results.settings.steps}
    for ax, (name, x) in zip(axes, places.items(), strict=True):
        for value in ("error", "correlation"):
            ax.semilogx(x, results.values("path", f"{value} over {name}").mean(0), label=f"{value} of the first stage")
        ax.set(xlabel="weight decay / top eigenvalue" if name == "decay" else "gradient steps")
        ax.legend(fontsize=8)
    return fig
