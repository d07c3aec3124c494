"""Pictures of ensembles in the information plane over training, and of how far each layer compresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchfolio.runs import Results, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def planes_over_training(results: Results) -> Figure:
    """Paths of all layers of the first seed, means over networks, from light to dark; by both estimators."""
    import matplotlib.pyplot as plt

    names = [*results.settings.activations, "relu_l2"]
    fig, axes = plt.subplots(
        2, len(names), figsize=(3.3 * len(names), 6), layout="constrained", squeeze=False, sharey=True
    )
    rows = (("i_xt", "i_ty", "adaptive bins"), ("kernel_i_xt", "kernel_i_ty", "adaptive kernels"))
    for line, (across, up, title) in zip(axes, rows, strict=True):
        for ax, name in zip(line, names, strict=True):
            arm = results.arms[0][name]
            i_xt, i_ty = np.asarray(arm[across]).mean(1), np.asarray(arm[up]).mean(1)
            layers = i_xt.shape[1]
            for k in range(layers):
                label = "output" if k == layers - 1 else f"layer {k + 1}"
                ax.plot(i_xt[:, k], i_ty[:, k], c=f"C{k}", lw=0.8, alpha=0.6)
                shades: Any = np.linspace(0.15, 1, len(i_xt))
                ax.scatter(i_xt[:, k], i_ty[:, k], c=[f"C{k}"] * len(i_xt), alpha=shades, s=12, label=label)
            ax.set(title=f"{name.replace('_', ', ')}: {title}", xlabel="$I(X;T)$ (bits)")
            ax.grid(alpha=0.3)
        line[0].set_ylabel("$I(T;Y)$ (bits)")
    axes[0, -1].legend(fontsize=7, loc="lower right")
    return fig


def compression_by_layer(results: Results) -> Figure:
    """Fall of the information on inputs, by layer and activation, a dot for each network."""
    names = [*results.settings.activations, "relu_l2"]
    fig, ax = plots.axes(ylabel="compression (bits); dots are networks")
    for k, name in enumerate(names):
        values = np.concatenate([np.asarray(seed[name]["compression"]) for seed in results.arms])
        place = np.arange(values.shape[1]) + (k - (len(names) - 1) / 2) * 0.18
        ax.plot(np.repeat(place[None], len(values), 0).ravel(), values.ravel(), ".", c=f"C{k}", ms=4, alpha=0.5)
        ax.plot(place, values.mean(0), "_", c=f"C{k}", ms=14, mew=2.5, label=name.replace("_", ", "))
    layers = len(results.settings.widths)
    ax.set_xticks(range(layers + 1), [*(f"layer {i + 1}" for i in range(layers)), "output"])
    ax.legend()
    return fig
