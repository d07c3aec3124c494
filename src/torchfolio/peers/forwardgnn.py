"""A step of single forward's layers, with the graph aggregated once, beside torch_geometric's layer called anew."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from torchfolio.data.graphs import planetoid
from torchfolio.local.forwardgnn import augment_with_virtual_nodes
from torchfolio.local.graph_layers import FrozenLayer, make_conv, normalize_rows
from torchfolio.local.graph_training import LayerStep, adam

__all__ = ["peers"]


def peers(bench: Any) -> None:
    """A step of every one of three layers on Cora with virtual nodes, 64 % of the nodes to train on."""
    from torch_geometric.nn import GCNConv

    graph = planetoid("cora")
    c, n = graph.num_classes, graph.num_nodes
    train = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) / n < 0.64).nonzero().flatten()
    mask = torch.zeros(n, dtype=torch.bool).index_fill(0, train, True)
    v = augment_with_virtual_nodes(graph.x, graph.edge_index, graph.y, mask, c)
    rows, y = torch.cat([train, torch.arange(n, n + c)]), graph.y[train]
    steps: dict[str, list[LayerStep]] = {"ours": [], "pyg": []}
    for l in range(3):
        h = normalize_rows(v.x if not l else torch.rand(n + c, 128))
        layer, peer = make_conv("gcn", h.shape[1], 128), GCNConv(h.shape[1], 128)
        part = FrozenLayer(layer, [h], v.edge_index, dense_rows=0 if l else c)[rows]
        whole = lambda peer=peer, h=h: F.relu(peer(h, v.edge_index)).index_select(0, rows)  # noqa: E731
        for name, module, output in (("ours", layer, part), ("pyg", peer, whole)):
            loss = lambda f=output: (lambda z: F.cross_entropy(z[:-c] @ z[-c:].T, y))(f())  # noqa: E731
            steps[name].append(LayerStep(module, loss, adam(module, 0.01, 5e-4)))
    calls: Any = {name: lambda all_=all_: [step() for step in all_] for name, all_ in steps.items()}
    bench.compare("layer-epoch, GCN, Cora, three layers", **calls)
