"""Layers for graphs, and what they ask of a graph.

GCN and GraphSAGE aggregate linearly before they transform. A layer that trains by itself on frozen inputs therefore
aggregates once: each step is one matrix product with a fixed matrix, sparse where the features are (bags of words),
and only over the nodes that the loss reads.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from torchfolio.local.frozen_layer import Aggregated, FrozenLayer, adjacency_of, aggregate_once, tensors_of
from torchfolio.local.graph_convs import GATConv, GCNConv, SAGEConv, make_conv
from torchfolio.local.sparse_matrix import Columns, LowRank, SparseMatrix

__all__ = [
    "Aggregated",
    "Columns",
    "FrozenLayer",
    "GATConv",
    "GCNConv",
    "LowRank",
    "SAGEConv",
    "SparseMatrix",
    "adjacency_of",
    "aggregate_once",
    "check_edges",
    "kind_of",
    "make_conv",
    "normalize_rows",
    "tensors_of",
]


def normalize_rows(x: Tensor) -> Tensor:
    """Rows over their norms, $\\nu(x) = x / (\\lVert x \\rVert_2 + 10^{-8})$; rows of zeros stay."""
    return x / (x.norm(dim=1, keepdim=True) + 1e-8)


def check_edges(edge_index: Any, num_nodes: int) -> Tensor:
    """Refuse what are no edges of a graph, and warn if it is directed.

    Args:
        edge_index: edges from the first row to the second, `[2, E]`.
        num_nodes: number of nodes.

    Raises:
        TypeError: if it is no tensor of whole numbers.
        ValueError: if its shape is another, or a node is out of range.
    """
    if not isinstance(edge_index, Tensor) or edge_index.is_floating_point() or edge_index.dtype == torch.bool:
        raise TypeError(f"expected edge_index to be a tensor of whole numbers, got {kind_of(edge_index)}")
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise ValueError(f"expected edge_index [2, E], got shape {tuple(edge_index.shape)}")
    edge_index = edge_index.long()
    if not edge_index.numel():
        return edge_index
    low, high = int(edge_index.min()), int(edge_index.max())
    if low < 0 or high >= num_nodes:
        raise ValueError(f"expected nodes from 0 to {num_nodes - 1} in edge_index, got {low} to {high}")
    there, back = (torch.unique(a * num_nodes + b) for a, b in (edge_index, edge_index.flip(0)))
    if not torch.equal(there, back):
        warnings.warn("edge_index has edges in one direction alone; messages go that way only", stacklevel=3)
    return edge_index


def kind_of(value: Any) -> str:
    """Its dtype if it is a tensor, else its type: what an error says it got."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
