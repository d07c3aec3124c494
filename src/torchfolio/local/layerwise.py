"""The common part of estimators whose graph layers each learn alone: settings, layer by layer, and side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from torchfolio.checks import at_least, finite, one_of, positive, whole
from torchfolio.local.frozen_layer import FrozenLayer
from torchfolio.local.graph_convs import make_conv
from torchfolio.local.graph_layers import normalize_rows
from torchfolio.local.graph_training import LayerStep, Sweeps, adam, train_locally

__all__ = ["LayerwiseEstimator", "Messages", "Reading", "outputs_by_layer"]


class Messages(NamedTuple):
    """What a layer reads: states of the nodes, and the edges over which they go.

    Attributes:
        h: states `[N, F]`.
        edge_index: edges `[2, E]`.
        dense_rows: number of last rows of `h` that are dense though the others are sparse.
    """

    h: Tensor
    edge_index: Tensor
    dense_rows: int = 0

    def through(self, layer: nn.Module) -> FrozenLayer:
        """The layer on these states, which stay the same while it trains."""
        return FrozenLayer(layer, [normalize_rows(self.h)], self.edge_index, dense_rows=self.dense_rows)


class Reading(NamedTuple):
    """What is made of a layer's outputs.

    Attributes:
        graphs: numbers of the graphs.
        rows: nodes that are read; `None` for all.
        value: function of those outputs, a list with one `[len(rows), F]` a graph.
    """

    graphs: slice
    rows: Tensor | None
    value: Callable[[list[Tensor]], Tensor]

    def of(self, layers: list[FrozenLayer]) -> list[FrozenLayer]:
        """The layer on the graphs and nodes that are read."""
        return [layer if self.rows is None else layer[self.rows] for layer in layers[self.graphs]]


def outputs_by_layer(layers: Sequence[nn.Module] | nn.ModuleList, graphs: list[Messages]) -> Iterator[list[Tensor]]:
    """Outputs of every layer in turn, a list with one `[N, F]` a graph."""
    for layer in layers:
        outputs = [graph.through(layer)() for graph in graphs]
        yield outputs
        graphs = [Messages(h, graph.edge_index) for h, graph in zip(outputs, graphs, strict=True)]


class LayerwiseEstimator(BaseEstimator):
    """Keeps layers, scores, losses and memory; trains the layers one after another, or all side by side.

    A subclass has the settings `conv`, `hidden`, `layers`, `algorithm`, `lr`, `weight_decay`, `epochs`, `val_every`,
    `patience`, `theta`, `time_steps` and `seed`, and names its algorithms.
    """

    ALGORITHMS: tuple[str, ...] = ()
    conv: Any
    hidden: int
    layers: int
    algorithm: str
    lr: float
    weight_decay: float
    epochs: int
    val_every: int
    patience: int
    theta: float
    time_steps: int
    seed: int

    def _check(self) -> None:
        one_of("algorithm", self.algorithm, self.ALGORITHMS)
        for name in ("hidden", "layers", "epochs", "val_every", "patience"):
            whole(name, getattr(self, name), 1)
        whole("time_steps", self.time_steps, 3)
        whole("seed", self.seed, 0)
        positive("lr", self.lr)
        at_least("weight_decay", self.weight_decay, 0)
        finite("theta", self.theta)

    def _start(self, x: Tensor) -> None:
        """Forget an earlier fit; the layers will have the device and dtype of `x`."""
        self._like = x.detach()[:0]
        self.layers_ = nn.ModuleList()
        self.layer_scores_: list[float] = []
        self.losses_: list[list[float]] = []
        self.peak_saved_bytes_ = 0

    def _check_fitted(self) -> None:
        if not hasattr(self, "layers_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted; call fit first")

    def _new_layer(self, in_features: int) -> nn.Module:
        layer = make_conv(self.conv, in_features, self.hidden).to(self._like)
        if {id(p) for p in layer.parameters()} & {id(p) for p in self.layers_.parameters()}:
            raise ValueError(
                "expected the factory to make new layers, got one that shares parameters with a layer below"
            )
        self.layers_.append(layer)
        return layer

    def _fit_by_layer(
        self,
        graphs: list[Messages],
        learn: Reading,
        ask: Reading | None,
        score: Callable[[Tensor], float],
        *,
        shared_inputs: bool = False,
    ) -> None:
        """Train every layer to its own end on frozen inputs, then freeze it.

        Args:
            graphs: graphs that the first layer reads.
            learn: loss.
            ask: the layer's part of the answer; the parts are summed. `None` without validation.
            score: validation score of the sum.
            shared_inputs: whether all graphs of `learn` go on with the first one's outputs.
        """
        total = 0
        for l in range(self.layers):
            layer = self._new_layer(graphs[0].h.shape[1])
            frozen = [graph.through(layer) for graph in graphs]
            total = self._fit_layer(layer, learn, ask, score, frozen, total, exclude=not l)
            with torch.no_grad():
                states = [part() for part in frozen]
            if shared_inputs:
                states[learn.graphs] = states[:1] * len(states[learn.graphs])
            graphs = [Messages(h, graph.edge_index) for h, graph in zip(states, graphs, strict=True)]

    def _fit_layer(
        self, layer: nn.Module, learn: Reading, ask: Reading | None, score: Any, frozen: Any, total: Any, exclude: bool
    ) -> Any:
        taught = learn.of(frozen)
        known = [tensor for part in taught for tensor in part.tensors()] if exclude else []
        loss = lambda: learn.value([part() for part in taught])  # noqa: E731
        step = LayerStep(layer, loss, adam(layer, self.lr, self.weight_decay), known)
        if ask is None:
            self._train(layer, step, None)
        else:
            asked, value = ask.of(frozen), ask.value
            answer = lambda: total + value([part() for part in asked])  # noqa: E731
            self._train(layer, step, lambda: score(answer()))
            with torch.no_grad():
                total = answer()
        self.peak_saved_bytes_ = max(self.peak_saved_bytes_, step.peak or 0)
        return total

    def _fit_together(self, sweeps: Sweeps, loss: Any, weight_decay: float, score: Any, clip: float | None) -> None:
        """Train all layers side by side: `loss(l, z)` of each layer's output, `score()` for all of them."""
        sweeps.rise()
        sweeps.prepare(loss, self.lr, weight_decay, clip=clip)
        self._train(self.layers_, sweeps.step, score)
        self.peak_saved_bytes_ = sweeps.peak

    def _train(self, module: nn.Module, step: Callable[[], Tensor], score: Callable[[], float] | None) -> None:
        losses, best = train_locally(
            module, step, score, epochs=self.epochs, val_every=self.val_every, patience=self.patience
        )
        self.losses_.append(losses)
        self.layer_scores_.append(best)
