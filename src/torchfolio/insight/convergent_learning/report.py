"""The whole analysis of two networks, with its table and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from torchfolio.insight.activations import Probe, input_batches, layer_name
from torchfolio.insight.convergent_learning.clusters import Clusters, spectral_clusters
from torchfolio.insight.convergent_learning.matching import Match, bipartite_match, semi_match
from torchfolio.insight.convergent_learning.prediction import ALPHAS, SparsePrediction, sparse_prediction
from torchfolio.insight.convergent_learning.statistics import CorrelationBlocks, PairStatistics, activations

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

T = TypeVar("T")
Layer = str | nn.Module
Layers = Sequence[Layer | tuple[Layer, Layer]]


@dataclass(frozen=True)
class LayerConvergence:
    """One layer of each network, compared.

    Attributes:
        layer_a: name in the first network.
        layer_b: name in the second.
        blocks: their correlations.
        match: one-to-one matching.
        semi: best partner in the second network of every unit of the first.
        prediction: of the second network's units from the first's.
        clusters: of the units of both.
    """

    layer_a: str
    layer_b: str
    blocks: CorrelationBlocks
    match: Match
    semi: Match
    prediction: SparsePrediction
    clusters: Clusters

    @classmethod
    def from_blocks(
        cls,
        layer_a: str,
        layer_b: str,
        blocks: CorrelationBlocks,
        *,
        absolute: bool = False,
        alphas: Sequence[float] = ALPHAS,
        n_clusters: int | None = None,
        random_state: int = 0,
    ) -> LayerConvergence:
        """Match, predict and cluster; see `ConvergenceReport.from_modules` for the arguments."""
        return cls(
            layer_a,
            layer_b,
            blocks,
            bipartite_match(blocks.between, absolute),
            semi_match(blocks.between, absolute),
            sparse_prediction(blocks, alphas),
            spectral_clusters(blocks, n_clusters, random_state),
        )

    @property
    def one_to_one_loss(self) -> float:
        """Loss of predicting every matched unit by its match alone, $\\tfrac12 (1 - c^2)$."""
        return float((0.5 * (1 - self.match.value.square())).mean())

    def summary(self) -> dict[str, float | int | str]:
        """The row of this layer in `ConvergenceReport.to_frame`."""
        curve = self.prediction.curve()
        sizes, dead = self.blocks.sizes, self.blocks.dead
        return {
            "layer_a": self.layer_a,
            "layer_b": self.layer_b,
            "samples": self.blocks.count,
            "units_a": sizes[0],
            "units_b": sizes[1],
            "dead_a": dead[0],
            "dead_b": dead[1],
            "bipartite": self.match.mean,
            "semi": self.semi.mean,
            "above_half": self.match.above(0.5),
            "shared": self.semi.shared,
            "one_to_one_loss": self.one_to_one_loss,
            "dense_loss": float(curve["loss"].iloc[0]),
            "sparse_loss": float(curve["loss"].iloc[-1]),
            "sparse_units": float(curve["nonzeros"].iloc[-1]),
            "few_units": self.prediction.fewest(),
            "clusters": int(self.clusters.labels.max()) + 1,
            "mixed_clusters": self.clusters.mixed,
            "contrast": self.clusters.contrast(),
            "random_contrast": self.clusters.contrast(seed=0),
        }


@dataclass(frozen=True)
class ConvergenceReport:
    """How far two networks learned the same features, layer by layer.

    Attributes:
        layers: the comparisons, in the order asked for.
    """

    layers: tuple[LayerConvergence, ...]

    @classmethod
    def from_modules(
        cls,
        module_a: nn.Module,
        module_b: nn.Module,
        data: Probe,
        layers: Layers | None = None,
        *,
        unit_dim: int | None = None,
        every: int = 1,
        absolute: bool = False,
        alphas: Sequence[float] = ALPHAS,
        n_clusters: int | None = None,
        random_state: int = 0,
        batch_size: int = 256,
    ) -> ConvergenceReport:
        """Compare two networks on probe data, in one pass over the data.

        Args:
            module_a: a network; it runs in evaluation mode and is left as it was.
            module_b: another, of any architecture.
            data: inputs `[N, ...]`, a data set, or a loader; labels are not needed. 2,000 images suffice for small
                convolutional nets, since every position is a sample.
            layers: names (or modules of the first network) that both have, or pairs of a layer of each, of which
                the outputs are compared; best after the activation. By default the first network's children that
                the second has too, without the last, which is the classifier.
            unit_dim: axis of the units in activations; see `unit_rows`.
            every: keep each so-many-th position of maps and tokens.
            absolute: match on $|c|$; for activations of arbitrary sign.
            alphas: penalties of the sparse prediction.
            n_clusters: a quarter of the units by default.
            random_state: of the clustering.
            batch_size: of tensors and data sets.

        Raises:
            ValueError: if a layer is unknown (the message lists those there are), the layers have different
                numbers of positions, a layer is constant, or a value is not finite.

        Shapes:
            Layers may return `[N, S]`, `[N, S, H, W]` or `[N, T, S]`, of different widths.

        Example:
            >>> report = ConvergenceReport.from_modules(net, other, x, layers=["layer1", "layer2"])
            >>> report.to_frame()[["layer_a", "bipartite", "semi", "dense_loss"]]

        Reference:
            Li et al., ICLR 2016.
        """
        pairs = _pairs(module_a, module_b, layers)
        statistics = [PairStatistics(unit_dim, every) for _ in pairs]
        for x in input_batches(data, batch_size):
            seen_a = activations(module_a, list(dict.fromkeys(a for a, _ in pairs)), x)
            seen_b = activations(module_b, list(dict.fromkeys(b for _, b in pairs)), x)
            for one, (a, b) in zip(statistics, pairs, strict=True):
                _named(one.add, a, b, seen_a[a], seen_b[b])
        compared = []
        for one, (a, b) in zip(statistics, pairs, strict=True):
            blocks = _named(one.finalize, a, b)
            settings = {"absolute": absolute, "alphas": alphas, "n_clusters": n_clusters, "random_state": random_state}
            compared.append(LayerConvergence.from_blocks(a, b, blocks, **settings))
        return cls(tuple(compared))

    def __getitem__(self, layer: str) -> LayerConvergence:
        for one in self.layers:
            if one.layer_a == layer:
                return one
        raise KeyError(f"{layer!r} was not compared; there are {', '.join(one.layer_a for one in self.layers)}")

    def to_frame(self) -> pd.DataFrame:
        """A row for every layer, of plain numbers.

        Units and dead units of both networks; mean similarity of the one-to-one (`bipartite`) and the free (`semi`)
        matching, share of pairs above 0.5, units that share a partner; losses of predicting a unit by its match, by all
        units (the least penalty) and by few (the greatest, with `sparse_units` used), and the units needed to come
        within 0.02 of the dense loss; number of clusters, share of mixed ones, and how much higher correlations are
        inside than between clusters, with true and random labels.
        """
        import pandas as pd

        return pd.DataFrame([one.summary() for one in self.layers])

    def units(self) -> pd.DataFrame:
        """A row for every pair of the one-to-one matchings: `layer_a`, `layer_b`, `unit_a`, `unit_b`, `value`."""
        import pandas as pd

        frames = [
            pd.DataFrame({"layer_a": one.layer_a, "layer_b": one.layer_b, **one.match.to_frame()})
            for one in self.layers
        ]
        return pd.concat(frames, ignore_index=True)

    def plot(self) -> Figure:
        """Matched correlations, loss against the number of units, and the clustered correlations of every layer."""
        import matplotlib.pyplot as plt

        columns = max(2, len(self.layers))
        figure = plt.figure(figsize=(max(9.0, 3.6 * columns), 7.5), layout="constrained")
        top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
        curves, losses = top.subplots(1, 2)
        _draw_matches(curves, self.layers)
        _draw_losses(losses, self.layers)
        axes = bottom.subplots(1, len(self.layers), squeeze=False)[0]
        for ax, one in zip(axes, self.layers, strict=True):
            image = _draw_blocks(ax, one)
        bottom.colorbar(image, ax=list(axes), label="correlation", shrink=0.8)
        return figure


def _named(call: Callable[..., T], a: str, b: str, *arguments: Tensor) -> T:
    """Say which layers an error is about."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise ValueError(f"layers {a!r} and {b!r}: {error}") from error


def _pairs(module_a: nn.Module, module_b: nn.Module, layers: Layers | None) -> list[tuple[str, str]]:
    if layers is None:
        names_b = {name for name, _ in module_b.named_children()}
        shared = [name for name, _ in list(module_a.named_children())[:-1] if name in names_b]
        if not shared:
            raise ValueError("the networks have no children of the same names; name the layers to compare")
        return [(name, name) for name in shared]
    pairs = []
    for layer in layers:
        a, b = layer if isinstance(layer, tuple) else (layer, layer_name(module_a, layer))
        pairs.append((layer_name(module_a, a), layer_name(module_b, b)))
    if not pairs:
        raise ValueError("expected at least one layer to compare, got none")
    return pairs


def _draw_matches(ax: Axes, layers: Sequence[LayerConvergence]) -> None:
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


def _draw_losses(ax: Axes, layers: Sequence[LayerConvergence]) -> None:
    for k, one in enumerate(layers):
        curve = one.prediction.curve()
        ax.plot(curve["nonzeros"], curve["loss"], "o-", c=f"C{k}", label=one.layer_a)
        ax.plot([1], [one.one_to_one_loss], "*", c=f"C{k}", ms=11)
    ax.plot([], [], "*", c="grey", ms=11, label="its match alone")
    ax.axhline(0.5, ls="--", c="grey", lw=1, label="its mean alone")
    ax.set(xlabel="units used for one prediction", ylabel="held-out loss", xscale="log", ylim=(0, None))
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def _draw_blocks(ax: Axes, one: LayerConvergence) -> AxesImage:
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
        weight_a: of a convolution, `[S_1, C, H, W]`, with one or three channels (of others the mean is shown).
        weight_b: `[S_2, C, H, W]`.
        match: of the layers' units.
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
