"""The whole analysis of two networks, with its table and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from torchfolio.insight.activations import Probe, input_batches, layer_name
from torchfolio.insight.convergent_learning.layer import LayerConvergence
from torchfolio.insight.convergent_learning.pictures import draw_blocks, draw_losses, draw_matches
from torchfolio.insight.convergent_learning.prediction import ALPHAS
from torchfolio.insight.convergent_learning.statistics import PairStatistics, activations

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

T = TypeVar("T")
Layer = str | nn.Module
Layers = Sequence[Layer | tuple[Layer, Layer]]


@dataclass(frozen=True)
class ConvergenceReport:
    """How far two networks learned the same features, layer by layer.

    Attributes:
        layers: comparisons, in the order asked for.
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
            every: stride over the positions of maps and tokens.
            absolute: match on $|c|$; for activations of arbitrary sign.
            alphas: penalties of the sparse prediction.
            n_clusters: a quarter of the units by default.
            random_state: seed of the clustering.
            batch_size: batch size of tensors and data sets.

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
        draw_matches(curves, self.layers)
        draw_losses(losses, self.layers)
        axes = bottom.subplots(1, len(self.layers), squeeze=False)[0]
        for ax, one in zip(axes, self.layers, strict=True):
            image = draw_blocks(ax, one)
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
