"""Single-forward learning on graphs: nodes against the virtual nodes of classes, with and without top-down signals.

Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, sections 3.2 and 3.3; part of ForwardGNN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.local.graph_layers import normalize_rows
from torchfolio.local.graph_training import Sweeps
from torchfolio.local.layerwise import Messages, Reading, outputs_by_layer
from torchfolio.local.node_estimator import NodeEstimator
from torchfolio.local.node_graph import NodeGraph, augment_with_virtual_nodes
from torchfolio.shown import Shown

__all__ = ["SingleForward", "TopDownInput", "TopDownLoss"]


class SingleForward(Shown):
    """One pass a layer: nodes against virtual nodes."""

    def __init__(self, owner: NodeEstimator, graph: NodeGraph) -> None:
        self.owner, self.graph = owner, graph
        self.n, self.c = len(graph.x), owner.num_classes_
        self.train_nodes, self.val_nodes = graph.train.nonzero().flatten(), graph.val.nonzero().flatten()
        linked = owner._linked_classes(graph.y)
        self.augmented = augment_with_virtual_nodes(
            graph.x, graph.edge_index, linked, graph.train, self.c, virtual=owner.virtual_
        )
        self.classes = torch.arange(self.n, self.n + self.c, device=graph.x.device)

    @property
    def messages(self) -> Messages:
        """What the first layer reads."""
        return Messages(self.augmented.x, self.augmented.edge_index, dense_rows=self.c)

    def logits(self, z: Tensor) -> Tensor:
        """Products of nodes with the virtual nodes, which are the last rows."""
        return z[: -self.c] @ z[-self.c :].T / self.owner.temperature

    def loss(self, z: Tensor) -> Tensor:
        """Cross-entropy of the training nodes, from their rows and the virtual nodes'."""
        return F.cross_entropy(self.logits(z), self.graph.y[self.train_nodes])

    def accuracy(self, scores: Tensor) -> float:
        """Share of validation nodes whose class has the largest score."""
        return scores.argmax(1).eq(self.graph.y[self.val_nodes]).double().mean().item()

    def fit(self, generator: torch.Generator) -> None:
        train, val = (torch.cat([nodes, self.classes]) for nodes in (self.train_nodes, self.val_nodes))
        learn = Reading(slice(1), train, lambda z: self.loss(z[0]))
        ask = Reading(slice(1), val, lambda z: self.logits(z[0]).softmax(1)) if len(self.val_nodes) else None
        self.owner._fit_by_layer([self.messages], learn, ask, self.accuracy)

    def probabilities(self) -> Tensor:
        outputs = outputs_by_layer(self.owner.layers_, [self.messages])
        return torch.stack([self.logits(h).softmax(1) for (h,) in outputs]).mean(0)


class TopDownInput(SingleForward):
    """Single forward, every layer with the state of the layer above beside its input."""

    clip: float | None = None

    def __init__(self, owner: NodeEstimator, graph: NodeGraph) -> None:
        super().__init__(owner, graph)
        # Labels above the top layer: of training and virtual nodes; uniform elsewhere.
        labels = torch.cat([torch.where(graph.train, graph.y, -1), self.classes - self.n])
        self.above = F.one_hot(labels.clamp(min=0), self.c).to(graph.x)
        self.above[labels < 0] = 1 / self.c

    def fit(self, generator: torch.Generator) -> None:
        owner = self.owner
        for l in range(owner.layers):
            owner._new_layer(self.in_features(l))
        sweeps = self.sweeps()

        def loss(l: int, z: Tensor) -> Tensor:
            embedding = self.embedding(sweeps, l, z)
            return self.loss(torch.cat([embedding.index_select(0, self.train_nodes), embedding[self.n :]]))

        score = (lambda: self.accuracy(self.probabilities()[self.val_nodes])) if len(self.val_nodes) else None
        owner._fit_together(sweeps, loss, owner.weight_decay, score, self.clip)

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

    def probabilities(self) -> Tensor:
        states = self.sweeps().settled(self.owner.time_steps)
        return torch.stack([self.logits(z).softmax(1) for z in states]).mean(0)


class TopDownLoss(TopDownInput):
    """Single forward, every layer's loss on the mean of its output and the states of all layers above."""

    clip = 1.0

    def in_features(self, l: int) -> int:
        return self.owner.hidden if l else self.graph.x.shape[1]

    def sweeps(self) -> Sweeps:
        return self._sweeps(down=False)

    def embedding(self, sweeps: Sweeps, l: int, z: Tensor) -> Tensor:
        above = [normalize_rows(state) for state in sweeps.states[l + 1 :]]
        return torch.stack([z, *above]).mean(0)

    def probabilities(self) -> Tensor:
        sweeps = self.sweeps()
        sweeps.rise()
        states = [self.logits(self.embedding(sweeps, l, z)).softmax(1) for l, z in enumerate(sweeps.states)]
        return torch.stack(states).mean(0)
