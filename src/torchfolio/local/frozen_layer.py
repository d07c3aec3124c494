"""Layers whose inputs stay the same while they train, aggregated once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.local.graph_convs import _LinearConv
from torchfolio.local.sparse_matrix import Columns, LowRank, SparseMatrix
from torchfolio.shown import Shown

__all__ = ["Aggregated", "FrozenLayer", "adjacency_of", "aggregate_once", "tensors_of"]

SPARSE = 0.1  # share of entries that are not zero, below which features are kept sparse


class Aggregated(NamedTuple):
    """Features that a linear layer has aggregated: what its weight multiplies, and their width before."""

    operand: Any
    width: int


def aggregate_once(conv: nn.Module, x: Tensor, adjacency: SparseMatrix | None, dense_rows: int = 0) -> Any:
    """Aggregate features for a linear layer; any other layer gets them as they are.

    Args:
        conv: layer.
        x: features `[N, F]`.
        adjacency: `conv.adjacency(...)`, `None` if it has none.
        dense_rows: number of last rows that are dense though the others are sparse.
    """
    if not isinstance(conv, _LinearConv) or adjacency is None:
        return x
    real = len(x) - dense_rows
    if int(x[:real].count_nonzero()) > SPARSE * x[:real].numel():
        return Aggregated(conv.aggregate(x, adjacency), x.shape[1])
    array = x.detach().cpu().to(torch.float64).numpy().copy()
    array[real:] = 0
    sparse = conv.aggregate(SparseMatrix(sp.csr_matrix(array), x), adjacency)
    if not dense_rows:
        return Aggregated(sparse, x.shape[1])
    # A dense row spreads to all its neighbours; how much of each arrives where is a thin matrix.
    which = torch.cat([x.new_zeros(real, dense_rows), torch.eye(dense_rows, dtype=x.dtype, device=x.device)])
    spread = LowRank(sparse, conv.aggregate(which, adjacency), torch.block_diag(*[x[real:]] * conv.parts))
    return Aggregated(spread, x.shape[1])


class FrozenLayer(Shown):
    """A layer with its activation on inputs that stay the same: `relu(conv(x, edge_index))`, all rows or some.

    Args:
        conv: layer. GCN and GraphSAGE aggregate once; any other is called on everything each time.
        pieces: features `[N, F]`, aggregated or not, that stand side by side.
        edge_index: edges `[2, E]`.
        adjacency: `adjacency_of(conv, ...)` if it is known.
        dense_rows: number of last rows of the features that are dense though the others are sparse.
    """

    def __init__(
        self,
        conv: nn.Module,
        pieces: Sequence[Any],
        edge_index: Tensor,
        adjacency: SparseMatrix | None = None,
        dense_rows: int = 0,
    ) -> None:
        self.conv, self.edge_index = conv, edge_index
        self.index: Tensor | None = None
        self.inputs: Any
        if isinstance(conv, _LinearConv):
            adjacency = adjacency or adjacency_of(conv, pieces[0], edge_index)
            parts = [p if isinstance(p, Aggregated) else aggregate_once(conv, p, adjacency, dense_rows) for p in pieces]
            self.inputs = parts[0].operand if len(parts) == 1 else _columns(conv, parts, edge_index.device)
        else:
            self.inputs = torch.cat(list(pieces), 1) if len(pieces) > 1 else pieces[0]

    def __getitem__(self, rows: Tensor) -> FrozenLayer:
        """The same layer, answering for some nodes alone."""
        part = copy.copy(self)
        if isinstance(self.conv, _LinearConv):
            part.inputs = self.inputs[rows]
        else:
            part.index = rows
        return part

    def __call__(self) -> Tensor:
        if isinstance(self.conv, _LinearConv):
            return F.relu(self.conv.transform(self.inputs))
        z = F.relu(self.conv(self.inputs, self.edge_index))
        if z.dim() != 2 or len(z) != len(self.inputs):
            raise ValueError(f"expected the layer to give [{len(self.inputs)}, features], got shape {tuple(z.shape)}")
        return z if self.index is None else z.index_select(0, self.index)

    def tensors(self) -> list[Tensor]:
        """The inputs that it holds."""
        return tensors_of(self.inputs)


def adjacency_of(conv: nn.Module, x: Tensor, edge_index: Tensor) -> SparseMatrix | None:
    """The matrix by which a linear layer aggregates features like `x`; `None` for other layers."""
    return conv.adjacency(edge_index, len(x), x) if isinstance(conv, _LinearConv) else None


def _columns(conv: _LinearConv, parts: list[Aggregated], device: torch.device) -> Columns:
    widths = [part.width for part in parts]
    index = torch.arange(conv.parts * sum(widths), device=device).view(conv.parts, -1).split(widths, 1)
    return Columns([(part.operand, of.flatten()) for part, of in zip(parts, index, strict=True)])


def tensors_of(operand: Any) -> list[Tensor]:
    """The dense tensors that an operand is made of."""
    if isinstance(operand, Aggregated):
        return tensors_of(operand.operand)
    if isinstance(operand, Columns):
        return [t for piece, of in operand.pieces for t in (*tensors_of(piece), of)]
    if isinstance(operand, LowRank):
        return [operand.left, operand.right]
    return [operand] if isinstance(operand, Tensor) else []
