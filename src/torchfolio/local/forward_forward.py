"""Forward-forward learning on graphs: right labels against wrong ones, in the features or as edges to virtual nodes.

Park et al., "Forward Learning of Graph Neural Networks", ICLR 2024, section 3.1; part of ForwardGNN. After Hinton,
"The Forward-Forward Algorithm", 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.local.graph_training import label_loss
from torchfolio.local.layerwise import Messages, Reading, outputs_by_layer
from torchfolio.local.node_estimator import NodeEstimator
from torchfolio.local.node_graph import NodeGraph, augment_with_virtual_nodes
from torchfolio.shown import Shown

__all__ = ["LabelsAppended", "LabelsAsEdges"]


class LabelsAppended(Shown):
    """A graph with the right labels and some with wrong ones; one for each candidate class when answering."""

    shared_inputs = False

    def __init__(self, owner: NodeEstimator, graph: NodeGraph) -> None:
        self.owner, self.graph, self.c = owner, graph, owner.num_classes_

    def labelled(self, y: Tensor) -> Messages:
        """Features and edges that carry the labels `y`, -1 for none."""
        onehot = F.one_hot(y.clamp(min=0), self.c).to(self.graph.x)
        onehot[y < 0] = 1 / self.c
        return Messages(torch.cat([self.graph.x, onehot], 1), self.graph.edge_index)

    def candidates(self, known: Tensor, asked: Tensor) -> list[Messages]:
        """A graph for every class: nodes in `asked` have that class, nodes in `known` their own."""
        y = torch.where(known, self.graph.y, -1)
        return [self.labelled(torch.where(asked, c, y)) for c in range(self.c)]

    def fit(self, generator: torch.Generator) -> None:
        owner, graph = self.owner, self.graph
        train, val = graph.train.nonzero().flatten(), graph.val.nonzero().flatten()
        labels = [graph.y, *owner._negatives(graph.y, generator)]
        graphs = [self.labelled(torch.where(graph.train, y, -1)) for y in labels]
        learn, ask = Reading(slice(0, len(graphs)), train, self.loss), None
        if len(val):
            ask = Reading(slice(len(graphs), None), val, self.goodness)
            graphs = graphs + self.candidates(graph.train, graph.val)
        accuracy = lambda total: total.argmax(1).eq(graph.y[val]).double().mean().item()  # noqa: E731
        owner._fit_by_layer(graphs, learn, ask, accuracy, shared_inputs=self.shared_inputs)

    def loss(self, outputs: list[Tensor]) -> Tensor:
        """Cross-entropy of the right labels' goodness, and the mean over the wrong ones of theirs."""
        right, *wrong = (z.square().sum(1) - self.owner.theta for z in outputs)
        return label_loss(right, True) + sum(label_loss(g, False) for g in wrong) / max(1, len(wrong))

    def goodness(self, outputs: list[Tensor]) -> Tensor:
        """Mean square `[N, C]`; the threshold would shift all classes alike."""
        return torch.stack([z[: len(self.graph.x)].square().mean(1) for z in outputs], 1)

    def probabilities(self) -> Tensor:
        graph, known = self.graph, self.graph.train | self.graph.val
        outputs = outputs_by_layer(self.owner.layers_, self.candidates(known, ~known))
        total = torch.stack([self.goodness(states) for states in outputs]).sum(0)
        one_hot = F.one_hot(graph.y.clamp(min=0), self.c).to(graph.x)
        return torch.where(known[:, None], one_hot, total.softmax(1))


class LabelsAsEdges(LabelsAppended):
    """Labels as edges to virtual nodes; all training graphs go on with the positive one's outputs."""

    shared_inputs = True

    def labelled(self, y: Tensor) -> Messages:
        graph = self.graph
        augmented = augment_with_virtual_nodes(
            graph.x, graph.edge_index, y, y >= 0, self.c, virtual=self.owner.virtual_
        )
        return Messages(augmented.x, augmented.edge_index, dense_rows=self.c)
