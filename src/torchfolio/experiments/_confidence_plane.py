"""The plane of the confidences of expert and auxiliary network, and the rays on which the score is the threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from torchfolio.runs import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def confidence_plane(results: Results) -> Figure:
    """Images of the first seed, clean and triggered, by both confidences, for each attack."""
    import matplotlib.pyplot as plt

    settings = results.settings
    names = settings.attacks
    fig, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.8), layout="constrained", squeeze=False, sharey=True
    )
    for ax, name in zip(axes[0], names, strict=True):
        first = results.arms[0][name]  # the first seed's; seeds differ in how many attacks succeed
        points, clean = np.asarray(first["points"]), int(first["clean_points"])
        ax.scatter(*points[:, :clean], s=8, alpha=0.5, label="clean")
        ax.scatter(*points[:, clean:], s=8, alpha=0.5, marker="x", label="triggered")
        _rays(ax, -float(first["threshold"]), settings.kappa)
        ax.set(
            xlabel="$b$, confidence of the expert", title=name.replace("_", " "), xlim=(-0.03, 1.03), ylim=(-0.03, 1.03)
        )
    axes[0, 0].set_ylabel("$m$, confidence of the auxiliary network")
    axes[0, -1].legend(loc="center left", framealpha=0.9)
    return fig


def _rays(ax: Axes, a: float, kappa: float) -> None:
    """Where the score equals the threshold: rejected is what lies below the one ray or right of the other."""
    m = np.linspace(0, 1, 101)
    if a > 0:
        ax.plot(m, np.minimum(a * kappa * m, 2), "k-", lw=1, label="threshold")
    below = m[m <= kappa]
    ax.plot(1 - a * (kappa - below), below, "k--", lw=1)
