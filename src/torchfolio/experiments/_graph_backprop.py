"""Graph convolutions trained end to end, their learning rate chosen on validation data: what forward learning replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.data.graphs import Graph
from torchfolio.engine import seeded
from torchfolio.local.forwardgnn_links import LinkSplit
from torchfolio.local.graph_layers import (
    Aggregated,
    adjacency_of,
    aggregate_once,
    make_conv,
    normalize_rows,
    tensors_of,
)
from torchfolio.local.graph_training import LayerStep, adam, train_locally
from torchfolio.measure import auroc

__all__ = ["backprop_links", "backprop_nodes", "backprop_peak"]


class Stack(nn.Module):
    """GCN layers trained end to end; the graph is normalised and the features are aggregated once, too."""

    def __init__(self, graph: Graph, widths: list[int]) -> None:
        super().__init__()
        widths = [graph.x.shape[1], *widths]
        self.convs = nn.ModuleList(make_conv("gcn", i, o) for i, o in zip(widths, widths[1:], strict=False))
        self.to(graph.x.device)
        self.adjacency = adjacency_of(self.convs[0], graph.x, graph.edge_index)
        self.first: Aggregated = aggregate_once(self.convs[0], normalize_rows(graph.x), self.adjacency)

    def forward(self) -> Tensor:
        h: Any = self.convs[0].transform(self.first.operand)  # pyright: ignore[reportCallIssue]
        for conv in list(self.convs)[1:]:
            h = conv.transform(self.adjacency @ F.relu(h))  # pyright: ignore[reportCallIssue, reportOptionalOperand]
        return h


def _best(
    settings: Any, make: Callable[[], Stack], loss: Any, score: Any, report: Any, seed: int
) -> tuple[float, float]:
    """Train end to end at each learning rate; validation score and report of the first that validates best."""
    results = []
    for lr in settings.lrs:
        with seeded(seed):
            net = make()
            step = LayerStep(net, lambda net=net: loss(net()), adam(net, lr, 5e-4))
            _, best = train_locally(
                net, step, lambda net=net: score(net()), epochs=2 * settings.epochs,
                val_every=settings.val_every, patience=settings.patience,
            )  # fmt: skip
        with torch.no_grad():
            results.append((best, report(net())))
    return max(results, key=_validation)


def _validation(result: tuple[float, float]) -> float:
    """What is chosen by: the report, a figure on test data, has no say even between equals."""
    return result[0]


def backprop_nodes(settings: Any, graph: Graph, test: Tensor, seed: int) -> dict[str, Any]:
    """Test accuracy with two and with three layers, and of the depth that validates best."""

    def accuracy(mask: Tensor) -> Callable[[Tensor], float]:
        return lambda z: float((z.argmax(1) == graph.y)[mask].double().mean())

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z[graph.train_mask], graph.y[graph.train_mask])

    found: dict[str, tuple[float, float]] = {}
    for depth in (2, 3):
        widths = [settings.hidden] * (depth - 1) + [graph.num_classes]
        scores = accuracy(graph.val_mask), accuracy(test)
        found[f"depth_{depth}"] = _best(settings, lambda widths=widths: Stack(graph, widths), loss, *scores, seed)
    tested = {name: report for name, (_, report) in found.items()}
    return tested | {"accuracy": max(found.values(), key=_validation)[1]}


def backprop_links(settings: Any, graph: Graph, split: LinkSplit, seed: int) -> float:
    """Area under the ROC curve on the test edges, by inner products of `settings.short` layers' outputs."""
    sparse = Graph(graph.x, split.edge_index, *(graph.y, *[graph.train_mask] * 3))

    def logits(z: Tensor, pairs: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([pairs, negatives], 1)
        logit = (z.index_select(0, both[0]) * z.index_select(0, both[1])).sum(1)
        return logit, (torch.arange(len(logit), device=z.device) < pairs.shape[1]).to(z)

    def loss(z: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(*logits(z, split.train, split.train_negative))

    scores = (
        lambda z: float(auroc(*logits(z, split.val, split.val_negative))),
        lambda z: float(auroc(*logits(z, split.test, split.test_negative))),
    )
    return _best(settings, lambda: Stack(sparse, [settings.hidden] * settings.short), loss, *scores, seed)[1]


def backprop_peak(graph: Graph, hidden: int, depth: int) -> int:
    """Most bytes held in a step, features and parameters excluded."""
    net = Stack(graph, [hidden] * (depth - 1) + [graph.num_classes])
    train = graph.train_mask
    step = LayerStep(net, lambda: F.cross_entropy(net()[train], graph.y[train]), adam(net, 1e-3, 0.0),
                     tensors_of(net.first))  # fmt: skip
    step()
    assert step.peak is not None
    return step.peak
