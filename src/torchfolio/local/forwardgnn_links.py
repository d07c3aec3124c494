"""Forward learning for link prediction: every layer tells edges from pairs that are none.

Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, section 4; part of ForwardGNN.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import between, finite, whole
from torchfolio.engine import seeded
from torchfolio.local.graph_convs import ConvFactory
from torchfolio.local.graph_layers import check_edges
from torchfolio.local.graph_training import Sweeps
from torchfolio.local.layerwise import LayerwiseEstimator, Messages, Reading, outputs_by_layer
from torchfolio.measure import auroc

__all__ = ["ForwardGNNLinkPredictor", "LinkSplit", "link_split"]


class LinkSplit(NamedTuple):
    """Edges to train, validate and test on, each with as many pairs that are no edges.

    Attributes:
        edge_index: training edges in both directions, over which messages go, `[2, 2P]`.
        train: training edges, one direction, `[2, P]`.
        train_negative: pairs that are no edges.
        val: validation edges.
        val_negative: pairs that are no edges.
        test: test edges.
        test_negative: pairs that are no edges.
    """

    edge_index: Tensor
    train: Tensor
    train_negative: Tensor
    val: Tensor
    val_negative: Tensor
    test: Tensor
    test_negative: Tensor


def link_split(
    edge_index: Tensor, num_nodes: int | None = None, val: float = 0.16, test: float = 0.2, seed: int = 0
) -> LinkSplit:
    """Split the edges of an undirected graph, and draw as many pairs that are no edges.

    Args:
        edge_index: edges `[2, E]`; direction, loops and repetitions do not matter.
        num_nodes: number of nodes; by default what the edges name.
        val: share of edges to validate on.
        test: share of edges to test on.
        seed: seed of the order and of the pairs.

    Raises:
        ValueError: if the shares leave no edges, or the graph too few pairs that are none.
    """
    between("val", val, 0, 1, inclusive=False)
    between("test", test, 0, 1, inclusive=False)
    if not edge_index.numel():
        raise ValueError("expected edges to split, got none")
    n = whole("num_nodes", int(edge_index.max()) + 1 if num_nodes is None else num_nodes, 2)
    both = check_edges(torch.cat([edge_index, edge_index.flip(0)], 1), n).cpu()
    keys = torch.unique(both[0][both[0] < both[1]] * n + both[1][both[0] < both[1]])
    count, pairs = len(keys), n * (n - 1) // 2
    sizes = [count - round(val * count) - round(test * count), round(val * count), round(test * count)]
    if min(sizes) < 1:
        raise ValueError(f"expected shares that leave edges in every part, got parts of {sizes} edges")
    if pairs < 2 * count:
        raise ValueError(f"expected as many pairs that are no edges as the {count} edges, got {pairs - count}")
    generator = torch.Generator().manual_seed(whole("seed", seed, 0))
    edges = keys[torch.randperm(count, generator=generator)]
    negatives = keys.new_empty(0)
    while len(negatives) < count:
        drawn = torch.randint(n, (2, 2 * count), generator=generator).sort(0).values
        drawn = (drawn[0] * n + drawn[1])[drawn[0] < drawn[1]]
        negatives = torch.unique(torch.cat([negatives, drawn[~torch.isin(drawn, keys)]]))
    negatives = negatives[torch.randperm(len(negatives), generator=generator)[:count]]
    parts = [torch.stack([k // n, k % n]).to(edge_index.device) for e in (edges, negatives) for k in e.split(sizes)]
    train, val_edges, test_edges, *none = parts
    return LinkSplit(torch.cat([train, train.flip(0)], 1), train, none[0], val_edges, none[1], test_edges, none[2])


class ForwardGNNLinkPredictor(LayerwiseEstimator):
    """Predict edges by layers that each learn alone.

    A layer's logit of a pair is $\\langle z_u, z_v\\rangle$ (`"fl"`) or the goodness
    $\\lVert z_u \\odot z_v\\rVert^2 - \\theta$ (`"ff"`); its loss is the cross-entropy of edges against pairs that are
    none. The score of a pair is the mean of the layers' sigmoids. `"top2input"` is `"fl"` with the state of the layer
    above beside each layer's input, all layers trained side by side without weight decay.

    Args:
        conv: `"gcn"`, `"sage"`, `"gat"`, or a factory `(in_features, out_features) -> module` whose module is called
            as `module(x, edge_index)`.
        hidden: width of every layer.
        layers: number of layers.
        algorithm: `"fl"`, `"ff"` or `"top2input"`.
        lr: learning rate of Adam, one optimizer a layer.
        weight_decay: weight decay, biases included.
        epochs: maximum number of steps of a layer.
        val_every: steps between validations.
        patience: number of validations without improvement before a layer stops.
        theta: threshold of the goodness.
        alternating: whether `"top2input"` updates odd layers before even ones.
        time_steps: number of sweeps of `"top2input"` before it answers, at least 3.
        seed: seed of the weights.

    Attributes:
        layers_: trained layers.
        layer_scores_: validation ROC-AUC with layers 1 to l, one number a layer (top-down: one in all).
        losses_: losses by layer and step.
        peak_saved_bytes_: largest number of bytes that autograd held at once, without parameters and the graph's
            features.

    Raises:
        ValueError: in `fit`, on settings, shapes or nodes out of range.

    Reference:
        Park et al., ICLR 2024, section 4.
    """

    ALGORITHMS = ("fl", "ff", "top2input")

    def __init__(
        self,
        conv: str | ConvFactory = "gcn",
        hidden: int = 128,
        layers: int = 2,
        algorithm: Literal["fl", "ff", "top2input"] = "fl",
        *,
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        epochs: int = 1000,
        val_every: int = 2,
        patience: int = 100,
        theta: float = 2.0,
        alternating: bool = True,
        time_steps: int = 10,
        seed: int = 0,
    ) -> None:
        self.conv, self.hidden, self.layers, self.algorithm = conv, hidden, layers, algorithm
        self.lr, self.weight_decay, self.epochs = lr, weight_decay, epochs
        self.val_every, self.patience, self.theta = val_every, patience, theta
        self.alternating, self.time_steps, self.seed = alternating, time_steps, seed

    def fit(self, x: Any, split: LinkSplit) -> ForwardGNNLinkPredictor:
        """Train all layers.

        Args:
            x: features `[N, F]`, or an object with `x`.
            split: edges, of which those of the test part are not read.
        """
        self._check()
        x = x if isinstance(x, Tensor) else getattr(x, "x", x)
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.numel() or not x.is_floating_point():
            raise ValueError(f"expected x to be features [N, F] in floating point, got {getattr(x, 'shape', type(x))}")
        finite("x", x)
        if not isinstance(split, LinkSplit):
            raise TypeError(f"expected a LinkSplit (see link_split), got {type(split).__name__}")
        self._x, self._edges = x.detach(), check_edges(split.edge_index, len(x)).to(x.device)
        self._start(self._x)
        train, val = ([self._pairs(p) for p in pair] for pair in (split[1:3], split[3:5]))
        if min(p.shape[1] for p in (*train, *val)) < 1:
            raise ValueError("expected edges and pairs that are none to train and to validate on")
        with seeded(self.seed):
            (self._fit_side_by_side if self.algorithm == "top2input" else self._fit_one_by_one)(train, val)
        self.layers_.eval().requires_grad_(False)
        self.embeddings_ = self._embed()
        return self

    @torch.no_grad()
    def predict_proba(self, pairs: Tensor) -> Tensor:
        """Scores `[P]` in [0, 1] of pairs of nodes `[2, P]`.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if a node is out of range.
        """
        self._check_fitted()
        return self._scores(self.embeddings_, self._pairs(pairs))

    def score(self, pairs: Tensor, negatives: Tensor) -> float:
        """ROC-AUC of edges `[2, P]` against pairs that are none."""
        return _auc(self.predict_proba(pairs), self.predict_proba(negatives))

    def logits(self, z: Tensor, pairs: Tensor) -> Tensor:
        """One layer's logits of pairs, from its outputs."""
        product = z.index_select(0, pairs[0]) * z.index_select(0, pairs[1])
        return product.square().sum(1) - self.theta if self.algorithm == "ff" else product.sum(1)

    def _loss(self, z: Tensor, train: list[Tensor]) -> Tensor:
        logits = self.logits(z, torch.cat(train, 1))
        target = (torch.arange(len(logits), device=z.device) < train[0].shape[1]).to(z)
        return F.binary_cross_entropy_with_logits(logits, target)

    def _fit_one_by_one(self, train: list[Tensor], val: list[Tensor]) -> None:
        pairs, sizes = torch.cat(val, 1), [part.shape[1] for part in val]
        learn = Reading(slice(1), None, lambda z: self._loss(z[0], train))
        ask = Reading(slice(1), None, lambda z: self.logits(z[0], pairs).sigmoid())
        self._fit_by_layer([Messages(self._x, self._edges)], learn, ask, lambda total: _auc(*total.split(sizes)))

    def _fit_side_by_side(self, train: list[Tensor], val: list[Tensor]) -> None:
        for l in range(self.layers):
            width = (self.hidden if l else self._x.shape[1]) + (self.hidden if l < self.layers - 1 else 0)
            self._new_layer(width)
        score = lambda: _auc(*(self._scores(self._embed(), p) for p in val))  # noqa: E731
        self._fit_together(self._sweeps(), lambda l, z: self._loss(z, train), 0.0, score, None)

    def _scores(self, states: list[Tensor], pairs: Tensor) -> Tensor:
        return torch.stack([self.logits(z, pairs).sigmoid() for z in states]).mean(0)

    def _sweeps(self) -> Sweeps:
        order = "alternating" if self.alternating else "together"
        return Sweeps(self.layers_, self._x, self._edges, self.hidden, order=order)

    @torch.no_grad()
    def _embed(self) -> list[Tensor]:
        """Outputs whose sigmoids are averaged: of all layers; top-down, of the time steps from 2 on, too."""
        if self.algorithm == "top2input":
            return self._sweeps().settled(self.time_steps)
        return [h for (h,) in outputs_by_layer(self.layers_, [Messages(self._x, self._edges)])]

    def _pairs(self, pairs: Any) -> Tensor:
        if not isinstance(pairs, Tensor) or pairs.dim() != 2 or len(pairs) != 2 or pairs.is_floating_point():
            raise ValueError(f"expected pairs of nodes [2, P], got {getattr(pairs, 'shape', type(pairs).__name__)}")
        if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < len(self._x):
            raise ValueError(
                f"expected nodes from 0 to {len(self._x) - 1}, got {int(pairs.min())} to {int(pairs.max())}"
            )
        return pairs.long().to(self._x.device)


def _auc(positive: Tensor, negative: Tensor) -> float:
    truth = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
    return float(auroc(torch.cat([positive, negative]), truth))
