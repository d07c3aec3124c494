"""Citation networks with a random split, and a small graph that is drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import one_of
from torchfolio.data.graphs import Graph, planetoid

__all__ = ["load_graph"]


def load_graph(name: str, seed: int, device: Any) -> tuple[Graph, Tensor]:
    """The graph with a random split: 64 % to train, 16 % to validate, 20 % to test."""
    one_of("graph", name, ("cora", "citeseer", "synthetic"))
    graph = planetoid(name) if name != "synthetic" else _synthetic()
    order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(seed)) / graph.num_nodes
    masks = [order < 0.64, (order >= 0.64) & (order < 0.8), order >= 0.8]
    tensors = [t.to(device) for t in (graph.x, graph.edge_index, graph.y, *masks)]
    return Graph(*tensors), tensors[-1]


def _synthetic(n: int = 150, classes: int = 3) -> Graph:
    """Nodes of a class are linked more often, and have words in common."""
    g, y = torch.Generator().manual_seed(0), torch.arange(n) % classes
    upper = (torch.rand(n, n, generator=g) < torch.where(y[:, None] == y, 0.1, 0.01)).triu(1)
    x = torch.rand(n, 60, generator=g) < torch.where(torch.arange(60) % classes == y[:, None], 0.1, 0.02)
    none = torch.zeros(n, dtype=torch.bool)
    return Graph(x.float(), (upper | upper.T).nonzero().T, y, none, none, none)
