"""ForwardGNN: graph neural networks trained layer by layer, by forward passes alone.

Namyong Park, Xing Wang, Antoine Simoulin, Shuai Yang, Grey Yang, Ryan Rossi, Puja Trivedi, Nesreen Ahmed, "Forward
Learning of Graph Neural Networks", ICLR 2024, https://arxiv.org/abs/2403.11004.

One virtual node a class joins the graph, linked to the training nodes of its class. A layer learns to put nodes near
the virtual node of their class (single forward); or it tells right labels from wrong ones by its goodness
(forward-forward, labels in the features or in the edges). Each layer trains on frozen inputs and stops by itself. The
five algorithms share one estimator, which makes this file longer than one of them would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, finite, one_of, positive, whole
from torchfolio.engine import seeded
from torchfolio.local.forwardgnn_links import ForwardGNNLinkPredictor, LinkSplit, link_split
from torchfolio.local.graph_layers import (
    ConvFactory,
    FrozenLayer,
    check_edges,
    make_conv,
    normalize_rows,
)
from torchfolio.local.graph_training import LayerStep, Sweeps, adam, label_loss, train_locally

__all__ = [
    "ForwardGNNClassifier",
    "ForwardGNNLinkPredictor",
    "LinkSplit",
    "VirtualGraph",
    "augment_with_virtual_nodes",
    "link_split",
]

Algorithm = Literal["sf", "ff-la", "ff-vn", "top2input", "top2loss"]


class VirtualGraph(NamedTuple):
    """A graph with virtual nodes.

    Attributes:
        x: features `[N + C, F]`, those of the virtual nodes last.
        edge_index: edges `[2, E']`, the given ones first.
        edge_type: 0 for given edges, 1 to C to a virtual node, C + 1 to 2C back from it.
        real_mask: which nodes are given ones.
    """

    x: Tensor
    edge_index: Tensor
    edge_type: Tensor
    real_mask: Tensor


def augment_with_virtual_nodes(
    x: Tensor,
    edge_index: Tensor,
    y: Tensor,
    mask: Tensor,
    num_classes: int,
    direction: Literal["both", "uni"] = "both",
    generator: torch.Generator | None = None,
    *,
    virtual: Tensor | None = None,
) -> VirtualGraph:
    """Append a node for every class, linked to the nodes of the class whose labels are known.

    Args:
        x: features `[N, F]`.
        edge_index: edges `[2, E]`.
        y: labels `[N]`, read where `mask` holds alone.
        mask: nodes to link, bool `[N]`.
        num_classes: number of classes C.
        direction: `"both"` links in both directions, `"uni"` to the virtual node alone.
        generator: source of the virtual nodes' features, N(0, 1).
        virtual: features of the virtual nodes `[C, F]`, instead of drawn ones.

    Returns:
        The graph with N + C nodes and E + 2 |mask| edges (E + |mask| if `"uni"`).

    Raises:
        ValueError: if a label is out of range or the direction unknown.

    Reference:
        Park et al., ICLR 2024, section 3.2.
    """
    one_of("direction", direction, ("both", "uni"))
    n, nodes = len(x), _mask("mask", mask, len(x)).nonzero().flatten()
    classes = y[nodes].long()
    if len(nodes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(f"expected labels from 0 to {num_classes - 1}, got {classes.unique().tolist()}")
    if virtual is None:
        virtual = torch.randn(num_classes, x.shape[1], generator=generator).to(x)
    links = torch.stack([nodes, n + classes])
    edges, types = [edge_index, links], [edge_index.new_zeros(edge_index.shape[1]), 1 + classes]
    if direction == "both":
        edges, types = [*edges, links.flip(0)], [*types, 1 + num_classes + classes]
    real = torch.arange(n + num_classes, device=x.device) < n
    return VirtualGraph(torch.cat([x, virtual]), torch.cat(edges, 1), torch.cat(types), real)


class _Graph(NamedTuple):
    """What an algorithm sees: labels are -1 wherever they are not given to it."""

    x: Tensor
    edge_index: Tensor
    y: Tensor
    train: Tensor
    val: Tensor


class ForwardGNNClassifier(BaseEstimator):
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
        peak_saved_bytes_: most bytes that autograd held at once, without parameters and the graph's features.
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
            x, edge_index, y, train_mask, val_mask = _unpack(x, val_mask)
        graph, self.num_classes_ = _door(x, edge_index, y, train_mask, val_mask)
        self.graph_ = graph
        generator = torch.Generator().manual_seed(self.seed)
        self.virtual_ = torch.randn(self.num_classes_, graph.x.shape[1], generator=generator).to(graph.x)
        self.layers_ = nn.ModuleList()
        self.layer_scores_: list[float] = []
        self.losses_: list[list[float]] = []
        self.peak_saved_bytes_ = 0
        with seeded(self.seed):
            _ALGORITHMS[self.algorithm](self, graph, generator).fit()
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
        return _ALGORITHMS[self.algorithm](self, graph, None).probabilities()

    def predict(self, x: Any = None, edge_index: Tensor | None = None) -> Tensor:
        """The likeliest class `[N]` of all nodes; see `predict_proba`."""
        return self.predict_proba(x, edge_index).argmax(1)

    def _linked_classes(self, y: Tensor) -> Tensor:
        """Class whose virtual node each training node is linked to: its own."""
        return y

    def _negatives(self, y: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Wrong labels `[N]`, one tensor a negative graph: for each node, a random order of the other classes."""
        key = torch.rand(len(y), self.num_classes_, generator=generator).to(y.device)
        order = key.scatter(1, y.clamp(min=0)[:, None], 2.0).argsort(1)
        return list(order[:, : min(self.n_negatives, self.num_classes_ - 1)].unbind(1))

    def _fitted(self, x: Tensor | None, edge_index: Tensor | None) -> _Graph:
        if not hasattr(self, "layers_"):
            raise NotFittedError("this ForwardGNNClassifier is not fitted; call fit first")
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
        one_of("algorithm", self.algorithm, _ALGORITHMS)
        for name in ("hidden", "layers", "epochs", "val_every", "patience", "n_negatives"):
            whole(name, getattr(self, name), 1)
        whole("time_steps", self.time_steps, 3)
        whole("seed", self.seed, 0)
        positive("lr", self.lr)
        positive("temperature", self.temperature)
        at_least("weight_decay", self.weight_decay, 0)
        finite("theta", self.theta)

    def _new_layer(self, in_features: int) -> nn.Module:
        self.layers_.append(make_conv(self.conv, in_features, self.hidden).to(self.graph_.x))
        return self.layers_[-1]

    def _train(self, layer: nn.Module, step: LayerStep, score: Callable[[], float] | None) -> None:
        losses, best = train_locally(
            layer, step, score, epochs=self.epochs, val_every=self.val_every, patience=self.patience
        )
        self.losses_.append(losses)
        self.layer_scores_.append(best)
        self.peak_saved_bytes_ = max(self.peak_saved_bytes_, step.peak or 0)

    def _step(self, layer: nn.Module, loss: Callable[[], Tensor], exclude: Any = ()) -> LayerStep:
        return LayerStep(layer, loss, adam(layer, self.lr, self.weight_decay), exclude)


class _SingleForward:
    """One pass a layer: nodes against virtual nodes."""

    def __init__(self, owner: ForwardGNNClassifier, graph: _Graph, generator: torch.Generator | None) -> None:
        self.owner, self.graph, self.generator = owner, graph, generator
        self.n, self.c = len(graph.x), owner.num_classes_
        self.train_nodes, self.val_nodes = graph.train.nonzero().flatten(), graph.val.nonzero().flatten()
        linked = owner._linked_classes(graph.y)
        self.augmented = augment_with_virtual_nodes(
            graph.x, graph.edge_index, linked, graph.train, self.c, virtual=owner.virtual_
        )
        self.classes = torch.arange(self.n, self.n + self.c, device=graph.x.device)

    def fit(self) -> None:
        owner, graph, h = self.owner, self.graph, self.augmented.x
        total = h.new_zeros(self.n, self.c)
        train_rows, val_rows = (torch.cat([rows, self.classes]) for rows in (self.train_nodes, self.val_nodes))
        y_train, y_val = graph.y[self.train_nodes], graph.y[self.val_nodes]
        for l in range(owner.layers):
            layer = owner._new_layer(h.shape[1])
            frozen = self.frozen(layer, h, l)
            train, val, before = frozen[train_rows], frozen[val_rows], total[self.val_nodes]
            step = owner._step(
                layer,
                lambda train=train: F.cross_entropy(self.logits(train()), y_train),
                () if l else train.tensors(),
            )
            accuracy = lambda val=val, before=before: (  # noqa: E731
                (before + self.logits(val()).softmax(1)).argmax(1).eq(y_val).double().mean().item()
            )
            owner._train(layer, step, accuracy if len(self.val_nodes) else None)
            with torch.no_grad():
                h = frozen()
                total += self.logits(h).softmax(1)

    def frozen(self, layer: nn.Module, h: Tensor, l: int) -> FrozenLayer:
        rows = 0 if l else self.c
        return FrozenLayer(layer, [normalize_rows(h)], self.augmented.edge_index, dense_rows=rows)

    def probabilities(self) -> Tensor:
        h, total = self.augmented.x, 0
        for l, layer in enumerate(self.owner.layers_):
            h = self.frozen(layer, h, l)()
            total = total + self.logits(h).softmax(1)
        return total / len(self.owner.layers_)  # pyright: ignore[reportReturnType]

    def logits(self, z: Tensor) -> Tensor:
        """Products of nodes with the virtual nodes, which are the last rows."""
        return z[: -self.c] @ z[-self.c :].T / self.owner.temperature


class _ForwardForward:
    """Right labels against wrong ones: a graph for each, and one for each candidate class when answering."""

    dense_rows = 0

    def __init__(self, owner: ForwardGNNClassifier, graph: _Graph, generator: torch.Generator | None) -> None:
        self.owner, self.graph, self.generator = owner, graph, generator
        self.c = owner.num_classes_
        self.train_nodes, self.val_nodes = graph.train.nonzero().flatten(), graph.val.nonzero().flatten()

    def labelled(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features and edges that carry the labels `y`, -1 for none."""
        onehot = F.one_hot(y.clamp(min=0), self.c).to(self.graph.x)
        onehot[y < 0] = 1 / self.c
        return torch.cat([self.graph.x, onehot], 1), self.graph.edge_index

    def next_inputs(self, outputs: list[Tensor]) -> list[Tensor]:
        """What the next layer reads, of the positive graph and the negative ones."""
        return outputs

    def candidates(self, known: Tensor, asked: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A graph for every class: nodes in `asked` have that class, nodes in `known` their own."""
        y = torch.where(known, self.graph.y, -1)
        return [self.labelled(torch.where(asked, c, y)) for c in range(self.c)]

    def fit(self) -> None:
        owner, graph = self.owner, self.graph
        assert self.generator is not None
        own = torch.where(graph.train, graph.y, -1)
        wrong = owner._negatives(graph.y, self.generator)
        graphs = [self.labelled(own), *(self.labelled(torch.where(graph.train, y, -1)) for y in wrong)]
        asked = self.candidates(graph.train, graph.val) if len(self.val_nodes) else []
        total, y_val = graph.x.new_zeros(len(self.val_nodes), self.c), graph.y[self.val_nodes]
        for l in range(owner.layers):
            layer = owner._new_layer(graphs[0][0].shape[1])
            frozen = [self.frozen(layer, pair, l) for pair in graphs]
            questions = [self.frozen(layer, pair, l) for pair in asked]
            outputs = [f[self.train_nodes] for f in frozen]
            answers = [f[self.val_nodes] for f in questions]
            goodness = lambda answers=answers: torch.stack([z().square().mean(1) for z in answers], 1)  # noqa: E731
            known = () if l else [t for f in outputs for t in f.tensors()]
            step = owner._step(layer, lambda outputs=outputs: self.loss(outputs), known)
            accuracy = lambda goodness=goodness, total=total: (  # noqa: E731
                (total + goodness()).argmax(1).eq(y_val).double().mean().item()
            )
            owner._train(layer, step, accuracy if asked else None)
            with torch.no_grad():
                total = total + goodness() if asked else total
                states = self.next_inputs([f() for f in frozen])
                graphs = [(h, edges) for h, (_, edges) in zip(states, graphs, strict=True)]
                asked = [(f(), edges) for f, (_, edges) in zip(questions, asked, strict=True)]

    def frozen(self, layer: nn.Module, pair: tuple[Tensor, Tensor], l: int) -> FrozenLayer:
        rows = 0 if l else self.dense_rows
        return FrozenLayer(layer, [normalize_rows(pair[0])], pair[1], dense_rows=rows)

    def loss(self, outputs: list[FrozenLayer]) -> Tensor:
        goodness = [z().square().sum(1) - self.owner.theta for z in outputs]
        return label_loss(goodness[0], True) + sum(label_loss(g, False) for g in goodness[1:]) / max(
            1, len(goodness) - 1
        )

    def probabilities(self) -> Tensor:
        graph, known = self.graph, self.graph.train | self.graph.val
        asked, total = self.candidates(known, ~known), 0
        for l, layer in enumerate(self.owner.layers_):
            states = [self.frozen(layer, pair, l)() for pair in asked]
            total = total + torch.stack([h[: len(graph.x)].square().mean(1) for h in states], 1)
            asked = [(h, edges) for h, (_, edges) in zip(states, asked, strict=True)]
        given = F.one_hot(graph.y.clamp(min=0), self.c).to(graph.x)
        return torch.where(known[:, None], given, total.softmax(1))  # pyright: ignore[reportAttributeAccessIssue]


class _ForwardForwardVirtual(_ForwardForward):
    """Labels as edges to virtual nodes; all graphs go on with the positive graph's outputs."""

    def __init__(self, owner: ForwardGNNClassifier, graph: _Graph, generator: torch.Generator | None) -> None:
        super().__init__(owner, graph, generator)
        self.dense_rows = self.c

    def labelled(self, y: Tensor) -> tuple[Tensor, Tensor]:
        graph = self.graph
        augmented = augment_with_virtual_nodes(
            graph.x, graph.edge_index, y, y >= 0, self.c, virtual=self.owner.virtual_
        )
        return augmented.x, augmented.edge_index

    def next_inputs(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs[:1] * len(outputs)


class _Top2Input(_SingleForward):
    """Single forward, every layer with the state of the layer above beside its input."""

    def __init__(self, owner: ForwardGNNClassifier, graph: _Graph, generator: torch.Generator | None) -> None:
        super().__init__(owner, graph, generator)
        # Labels above the top layer: of training and virtual nodes; uniform elsewhere.
        labels = torch.cat([torch.where(graph.train, graph.y, -1), self.classes - self.n])
        self.above = F.one_hot(labels.clamp(min=0), self.c).to(graph.x)
        self.above[labels < 0] = 1 / self.c

    def fit(self) -> None:
        owner, graph = self.owner, self.graph
        y_train, y_val = graph.y[self.train_nodes], graph.y[self.val_nodes]
        for l in range(owner.layers):
            owner._new_layer(self.in_features(l))
        sweeps = self.sweeps()
        sweeps.rise()

        def loss(l: int, z: Tensor) -> Tensor:
            embedding = self.embedding(sweeps, l, z)
            rows = torch.cat([embedding.index_select(0, self.train_nodes), embedding[self.n :]])
            return F.cross_entropy(self.logits(rows), y_train)

        sweeps.prepare(loss, owner.lr, owner.weight_decay, clip=self.clip)

        def accuracy() -> float:
            return self.answer()[self.val_nodes].argmax(1).eq(y_val).double().mean().item()

        losses, best = train_locally(
            owner.layers_,
            sweeps.step,
            accuracy if len(self.val_nodes) else None,
            epochs=owner.epochs,
            val_every=owner.val_every,
            patience=owner.patience,
        )
        owner.losses_.append(losses)
        owner.layer_scores_.append(best)
        owner.peak_saved_bytes_ = sweeps.peak

    clip = None

    def in_features(self, l: int) -> int:
        above = self.c if l == self.owner.layers - 1 else self.owner.hidden
        return (self.owner.hidden if l else self.graph.x.shape[1]) + above

    def sweeps(self) -> Sweeps:
        order = "alternating" if self.owner.alternating else "together"
        return self._sweeps(above=self.above, order=order)

    def _sweeps(self, **kind: Any) -> Sweeps:
        graph, owner = self.augmented, self.owner
        return Sweeps(owner.layers_, graph.x, graph.edge_index, owner.hidden, dense_rows=self.c, **kind)

    def embedding(self, sweeps: Sweeps, l: int, z: Tensor) -> Tensor:
        """What the loss of layer l reads."""
        return z

    def answer(self) -> Tensor:
        sweeps, total = self.sweeps(), 0
        sweeps.rise()
        for time in range(1, self.owner.time_steps + 1):
            sweeps.move()
            if 2 <= time < self.owner.time_steps:
                total = total + sum(self.logits(z).softmax(1) for z in sweeps.states)
        return total / (len(self.owner.layers_) * (self.owner.time_steps - 2))  # pyright: ignore[reportReturnType]

    def probabilities(self) -> Tensor:
        return self.answer()


class _Top2Loss(_Top2Input):
    """Single forward, every layer's loss on the mean of its output and the states of all layers above."""

    clip = 1.0

    def in_features(self, l: int) -> int:
        return self.owner.hidden if l else self.graph.x.shape[1]

    def sweeps(self) -> Sweeps:
        return self._sweeps(down=False)

    def embedding(self, sweeps: Sweeps, l: int, z: Tensor) -> Tensor:
        above = [normalize_rows(state) for state in sweeps.states[l + 1 :]]
        return torch.stack([z, *above]).mean(0)

    def answer(self) -> Tensor:
        sweeps = self.sweeps()
        sweeps.rise()
        states = [self.logits(self.embedding(sweeps, l, z)).softmax(1) for l, z in enumerate(sweeps.states)]
        return torch.stack(states).mean(0)


_ALGORITHMS: dict[str, Any] = {
    "sf": _SingleForward,
    "ff-la": _ForwardForward,
    "ff-vn": _ForwardForwardVirtual,
    "top2input": _Top2Input,
    "top2loss": _Top2Loss,
}


def _unpack(data: Any, val_mask: Tensor | None) -> tuple[Any, ...]:
    missing = [name for name in ("x", "edge_index", "y", "train_mask") if getattr(data, name, None) is None]
    if missing:
        raise TypeError(f"expected x, edge_index, y and train_mask, or an object that has them, got no {missing[0]}")
    val_mask = val_mask if val_mask is not None else getattr(data, "val_mask", None)
    return data.x, data.edge_index, data.y, data.train_mask, val_mask


def _door(x: Any, edge_index: Any, y: Any, train_mask: Any, val_mask: Any) -> tuple[_Graph, int]:
    """The graph, with labels hidden that are not to be learned from, and the number of classes."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"expected x to be a tensor of floating point numbers, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.dim() != 2 or not x.numel():
        raise ValueError(f"expected x to be features [N, F], got shape {tuple(x.shape)}")
    finite("x", x)
    if not isinstance(y, Tensor) or y.is_floating_point():
        raise TypeError(f"expected y to be a tensor of whole numbers, got {getattr(y, 'dtype', type(y).__name__)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"expected y to be labels [{len(x)}], got shape {tuple(y.shape)}")
    train = _mask("train_mask", train_mask, len(x)).to(x.device)
    val = _mask("val_mask", val_mask, len(x)).to(x.device) if val_mask is not None else torch.zeros_like(train)
    if bool((train & val).any()):
        raise ValueError(
            f"expected train_mask and val_mask to be disjoint, got {int((train & val).sum())} common nodes"
        )
    if not bool(train.any()):
        raise ValueError("expected at least one training node, got none")
    y = torch.where(train | val, y.to(x.device).long(), -1)
    if int(y[train | val].min()) < 0:
        raise ValueError(f"expected labels from 0 upwards, got {int(y[train | val].min())}")
    num_classes = int(y.max()) + 1
    absent = sorted(set(range(num_classes)) - set(y[train].tolist()))
    if absent:
        raise ValueError(f"expected a training node of every class, got none of class {absent[0]}")
    if num_classes < 2:
        raise ValueError("expected two classes or more, got one")
    return _Graph(x.detach(), check_edges(edge_index, len(x)).to(x.device), y, train, val), num_classes


def _mask(name: str, mask: Any, num_nodes: int) -> Tensor:
    """A bool mask `[N]` from a mask of any type, or from indices."""
    if mask is None:
        raise TypeError(f"expected {name} to be a mask or indices, got None")
    mask = torch.as_tensor(mask)
    if mask.dtype == torch.bool or mask.is_floating_point() or (mask.shape == (num_nodes,) and int(mask.max()) <= 1):
        if mask.shape != (num_nodes,) or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"expected {name} to be a mask [{num_nodes}] of 0 and 1, got shape {tuple(mask.shape)}")
        return mask.bool()
    if mask.dim() != 1 or (len(mask) and not 0 <= int(mask.min()) <= int(mask.max()) < num_nodes):
        raise ValueError(f"expected {name} to be a mask or indices from 0 to {num_nodes - 1}")
    return torch.zeros(num_nodes, dtype=torch.bool, device=mask.device).index_fill(0, mask.long(), True)
