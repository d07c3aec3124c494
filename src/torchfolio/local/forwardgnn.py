"""ForwardGNN: graph neural networks trained layer by layer, by forward passes alone.

Namyong Park, Xing Wang, Antoine Simoulin, Shuai Yang, Grey Yang, Ryan Rossi, Puja Trivedi, Nesreen Ahmed, "Forward
Learning of Graph Neural Networks", ICLR 2024, https://arxiv.org/abs/2403.11004.

One virtual node a class joins the graph, linked to the training nodes of its class. A layer learns to put nodes near
the virtual node of their class (single forward); or it tells right labels from wrong ones by its goodness
(forward-forward, labels in the features or in the edges). Each layer trains on frozen inputs and stops by itself.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from torchfolio.checks import finite, positive, whole
from torchfolio.engine import seeded
from torchfolio.local.forward_forward import LabelsAppended, LabelsAsEdges
from torchfolio.local.forwardgnn_links import ForwardGNNLinkPredictor, LinkSplit, link_split
from torchfolio.local.graph_convs import ConvFactory
from torchfolio.local.graph_layers import check_edges
from torchfolio.local.node_estimator import NodeEstimator
from torchfolio.local.node_graph import NodeGraph, VirtualGraph, augment_with_virtual_nodes, node_graph, unpack
from torchfolio.local.single_forward import SingleForward, TopDownInput, TopDownLoss

__all__ = [
    "ForwardGNNClassifier",
    "ForwardGNNLinkPredictor",
    "LinkSplit",
    "VirtualGraph",
    "augment_with_virtual_nodes",
    "link_split",
]

Algorithm = Literal["sf", "ff-la", "ff-vn", "top2input", "top2loss"]
_ALGORITHMS: dict[str, type[SingleForward] | type[LabelsAppended]] = {
    "sf": SingleForward,
    "ff-la": LabelsAppended,
    "ff-vn": LabelsAsEdges,
    "top2input": TopDownInput,
    "top2loss": TopDownLoss,
}


class ForwardGNNClassifier(NodeEstimator):
    """Classify the nodes of a graph by layers that each learn alone.

    Single forward (`"sf"`): the layer's outputs $Z$ at nodes and virtual nodes give the loss

    $$\\ell = -\\frac1{|T|}\\sum_{i \\in T} \\log \\operatorname{softmax}_c(\\langle z_i, z_{N+c}\\rangle / \\tau)_{y_i},$$

    and the answer is the sum of all layers' softmax. Forward-forward (`"ff-la"`, labels appended to the features;
    `"ff-vn"`, labels as edges to virtual nodes) has the goodness $\\lVert z_i\\rVert^2 - \\theta$ large for right labels
    and small for wrong ones; the answer is the label of the largest goodness. `"top2input"` and `"top2loss"` are
    single forward with the layer above as input, or in the loss, and all layers train side by side.

    Args:
        conv: `"gcn"`, `"sage"`, `"gat"`, or a factory `(in_features, out_features) -> module` whose module is called
            as `module(x, edge_index)` (any of torch_geometric's layers, say).
        hidden: width of every layer.
        layers: number of layers.
        algorithm: `"sf"`, `"ff-la"`, `"ff-vn"`, `"top2input"` or `"top2loss"`.
        lr: learning rate of Adam, one optimizer a layer.
        weight_decay: weight decay, biases included.
        epochs: maximum number of steps of a layer.
        val_every: steps between validations.
        patience: number of validations without improvement before a layer stops.
        theta: threshold of the goodness.
        temperature: divisor $\\tau$ of the logits.
        n_negatives: number of negative graphs of forward-forward, at most C - 1 of them are used.
        alternating: whether `"top2input"` updates odd layers before even ones, rather than all from old states.
        time_steps: number of sweeps of `"top2input"` before it answers, at least 3.
        seed: seed of weights, virtual nodes and negatives.

    Attributes:
        layers_: trained layers.
        layer_scores_: validation accuracy with layers 1 to l, one number a layer (top-down: one in all).
        losses_: losses by layer and step.
        peak_saved_bytes_: largest number of bytes that autograd held at once, without parameters and the graph's
            features.
        num_classes_: number of classes.

    Raises:
        ValueError: in `fit`, on settings, shapes or labels out of range, overlapping masks, and classes without a
            training node.

    Example:
        >>> from torchfolio.local import ForwardGNNClassifier
        >>> x, y = torch.eye(6), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> edges = torch.tensor([[0, 1, 1, 2, 3, 4, 4, 5], [1, 0, 2, 1, 4, 3, 5, 4]])
        >>> train, val = torch.tensor([0, 3]), torch.tensor([1, 4])
        >>> ForwardGNNClassifier(hidden=8, layers=1, lr=0.05, epochs=50).fit(x, edges, y, train, val).predict()
        tensor([0, 0, 0, 1, 1, 1])

    Reference:
        Park et al., ICLR 2024, sections 3 and 4.
    """

    ALGORITHMS = tuple(_ALGORITHMS)

    def __init__(
        self,
        conv: str | ConvFactory = "gcn",
        hidden: int = 128,
        layers: int = 3,
        algorithm: Algorithm = "sf",
        *,
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        epochs: int = 1000,
        val_every: int = 2,
        patience: int = 100,
        theta: float = 2.0,
        temperature: float = 1.0,
        n_negatives: int = 2,
        alternating: bool = True,
        time_steps: int = 10,
        seed: int = 0,
    ) -> None:
        self.conv, self.hidden, self.layers, self.algorithm = conv, hidden, layers, algorithm
        self.lr, self.weight_decay, self.epochs = lr, weight_decay, epochs
        self.val_every, self.patience = val_every, patience
        self.theta, self.temperature, self.n_negatives = theta, temperature, n_negatives
        self.alternating, self.time_steps, self.seed = alternating, time_steps, seed

    def fit(
        self,
        x: Any,
        edge_index: Tensor | None = None,
        y: Tensor | None = None,
        train_mask: Tensor | None = None,
        val_mask: Tensor | None = None,
    ) -> ForwardGNNClassifier:
        """Train all layers.

        Args:
            x: features `[N, F]`, or an object with `x`, `edge_index`, `y`, `train_mask` and, if there is one,
                `val_mask` (`torch_geometric.data.Data`, `torchfolio.data.graphs.Graph`).
            edge_index: edges `[2, E]`, in both directions if the graph is undirected.
            y: labels `[N]`, read at training and validation nodes alone.
            train_mask: training nodes, as a mask `[N]` or as indices.
            val_mask: validation nodes, likewise; without them layers train all epochs.
        """
        self._check()
        if edge_index is None:
            x, edge_index, y, train_mask, val_mask = unpack(x, val_mask)
        self.graph_, self.num_classes_ = node_graph(x, edge_index, y, train_mask, val_mask)
        self._start(self.graph_.x)
        generator = torch.Generator().manual_seed(self.seed)
        features = self.graph_.x.shape[1]
        self.virtual_ = torch.randn(self.num_classes_, features, generator=generator).to(self.graph_.x)
        with seeded(self.seed):
            _ALGORITHMS[self.algorithm](self, self.graph_).fit(generator)
        self.layers_.eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def predict_proba(self, x: Any = None, edge_index: Tensor | None = None) -> Tensor:
        """Probabilities `[N, C]` of all nodes.

        Forward-forward appends candidate labels to nodes whose labels are unknown; the others keep theirs.

        Args:
            x: other features of the same nodes, or an object with `x` and `edge_index`; by default those of `fit`.
            edge_index: other edges among them.

        Raises:
            NotFittedError: before `fit`.
            ValueError: if the shapes differ from those of `fit`.
        """
        graph = self._fitted(x, edge_index)
        return _ALGORITHMS[self.algorithm](self, graph).probabilities()

    def predict(self, x: Any = None, edge_index: Tensor | None = None) -> Tensor:
        """The likeliest class `[N]` of all nodes; see `predict_proba`."""
        return self.predict_proba(x, edge_index).argmax(1)

    def _fitted(self, x: Tensor | None, edge_index: Tensor | None) -> NodeGraph:
        self._check_fitted()
        graph = self.graph_
        if x is not None and not isinstance(x, Tensor) and edge_index is None:
            x, edge_index = getattr(x, "x", x), getattr(x, "edge_index", None)
        if x is not None:
            if not isinstance(x, Tensor) or x.shape != graph.x.shape:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"expected features of the fitted nodes, {tuple(graph.x.shape)}, got {got}")
            graph = graph._replace(x=finite("x", x.to(graph.x)))
        return graph if edge_index is None else graph._replace(edge_index=check_edges(edge_index, len(graph.x)))

    def _check(self) -> None:
        super()._check()
        whole("n_negatives", self.n_negatives, 1)
        positive("temperature", self.temperature)
