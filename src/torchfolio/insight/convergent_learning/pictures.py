"""Pictures of two networks' layers, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchfolio.insight.convergent_learning.layer import LayerConvergence
from torchfolio.insight.convergent_learning.matching import Match

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["draw_blocks", "draw_losses", "draw_matches", "plot_filter_pairs"]


def draw_matches(ax: Axes, layers: Sequence[LayerConvergence]) -> None:
    """Correlations of matched units, the best first."""
    for k, one in enumerate(layers):
        for match, style in ((one.match, "-"), (one.semi, ":")):
            values = match.value.sort(descending=True).values
            share = torch.linspace(0, 100, len(values))
            label = one.layer_a if style == "-" else None
            ax.plot(share.numpy(), values.numpy(), style, c=f"C{k}", label=label)
    ax.plot([], [], "-", c="grey", label="one to one")
    ax.plot([], [], ":", c="grey", label="best partner")
    ax.set(xlabel="units, best first (%)", ylabel="correlation with its match", ylim=(None, 1.02))
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def draw_losses(ax: Axes, layers: Sequence[LayerConvergence]) -> None:
    """Loss of predicting a unit against the number of units that are used for it."""
    for k, one in enumerate(layers):
        curve = one.prediction.curve()
        ax.plot(curve["nonzeros"], curve["loss"], "o-", c=f"C{k}", label=one.layer_a)
        ax.plot([1], [one.one_to_one_loss], "*", c=f"C{k}", ms=11)
    ax.plot([], [], "*", c="grey", ms=11, label="its match alone")
    ax.axhline(0.5, ls="--", c="grey", lw=1, label="its mean alone")
    ax.set(xlabel="units used for one prediction", ylabel="held-out loss", xscale="log", ylim=(0, None))
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def draw_blocks(ax: Axes, one: LayerConvergence) -> AxesImage:
    """Correlations of the units of both networks in the order of the clusters; a bar shows whose units they are."""
    order = one.clusters.order
    joint = one.blocks.joint()[order][:, order]
    image = ax.imshow(joint.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    second = (order >= one.blocks.sizes[0]).double()[None]
    bar = ax.inset_axes((0, 1.01, 1, 0.04))
    bar.imshow(second.numpy(), aspect="auto", cmap="Greys", vmin=-0.3, vmax=1.2, interpolation="nearest")
    bar.axis("off")
    ax.set_xlabel("units of both, by cluster")
    ax.set_title(f"{one.layer_a} (bar: dark = second)", fontsize=9, pad=14)
    return image


def plot_filter_pairs(weight_a: Tensor, weight_b: Tensor, match: Match, limit: int = 16) -> Figure:
    """First-layer filters of two networks, each above its match, best matches first.

    Args:
        weight_a: weights of a convolution, `[S_1, C, H, W]`, with one or three channels (of others the mean is shown).
        weight_b: `[S_2, C, H, W]`.
        match: match of the layers' units.
        limit: largest number of pairs.

    Raises:
        ValueError: if the weights are not of convolutions.
    """
    import matplotlib.pyplot as plt

    if weight_a.dim() != 4 or weight_b.dim() != 4:
        raise ValueError(
            f"expected filters [units, channels, height, width], got {tuple(weight_a.shape)} and {tuple(weight_b.shape)}"
        )
    best = match.sorted()
    count = min(limit, len(best))
    figure, axes = plt.subplots(2, count, figsize=(max(4.0, 0.9 * count), 2.6), squeeze=False, layout="constrained")
    for k in range(count):
        for ax, weight, unit in zip(axes[:, k], (weight_a, weight_b), (best.row[k], best.col[k]), strict=True):
            _draw_filter(ax, weight[unit].detach().cpu().float())
        axes[0, k].set_title(f"{best.value[k]:.2f}", fontsize=9)
    axes[0, 0].set_ylabel("first")
    axes[1, 0].set_ylabel("second")
    figure.suptitle("matched filters and their correlation", fontsize=10)
    return figure


def _draw_filter(ax: Axes, weight: Tensor) -> None:
    if len(weight) == 3:
        low, high = float(weight.min()), float(weight.max())
        ax.imshow(((weight - low) / max(high - low, 1e-12)).permute(1, 2, 0).numpy())
    else:
        bound = max(float(weight.mean(0).abs().max()), math.ulp(0.0))
        ax.imshow(weight.mean(0).numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
    ax.set(xticks=[], yticks=[])
