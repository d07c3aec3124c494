"""Message passing on plain tensors: GCN, SAGE and GAT layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import one_of, whole
from torchfolio.local.sparse_matrix import SparseMatrix

__all__ = ["GATConv", "GCNConv", "SAGEConv", "make_conv"]

ConvFactory = Callable[[int, int], nn.Module]


class _LinearConv(nn.Module):
    """Aggregates linearly, then transforms: `transform(aggregate(x, adjacency))`.

    Args:
        in_features: width of `x`.
        out_features: width of the result.
    """

    parts = 1  # how many blocks as wide as x the aggregate has

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = (
            whole("in_features", in_features, 1),
            whole("out_features", out_features, 1),
        )
        self.weight = nn.Parameter(torch.empty(self.parts * in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        bound = math.sqrt(6 / (in_features + out_features))
        nn.init.uniform_(self.weight, -bound, bound)

    @staticmethod
    def adjacency(edge_index: Tensor, num_nodes: int, like: Tensor) -> SparseMatrix:
        """The matrix that aggregates."""
        raise NotImplementedError

    def aggregate(self, x: Any, adjacency: SparseMatrix) -> Any:
        """What the transform takes, `[N, parts * in_features]`; sparse if `x` is."""
        return adjacency @ x

    def transform(self, aggregated: Any) -> Tensor:
        """The learnable part, row by row."""
        return aggregated @ self.weight + self.bias

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.transform(self.aggregate(x, self.adjacency(edge_index, len(x), x)))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class GCNConv(_LinearConv):
    """Graph convolution: $D^{-1/2}(A + I)D^{-1/2}\\,xW + b$.

    Reference:
        Kipf and Welling, ICLR 2017, equation 2.
    """

    @staticmethod
    def adjacency(edge_index: Tensor, num_nodes: int, like: Tensor) -> SparseMatrix:
        """The normalised adjacency with loops."""
        matrix = _counts(edge_index, num_nodes) + sp.eye(num_nodes, format="csr")
        scale = sp.diags(1 / np.sqrt(np.asarray(matrix.sum(1)).ravel()))
        return SparseMatrix(scale @ matrix @ scale, like)


class SAGEConv(_LinearConv):
    """GraphSAGE with means: $W_1 x + W_2 \\operatorname{mean}_{j \\to i} x_j + b$; the mean of no neighbours is 0.

    Reference:
        Hamilton, Ying and Leskovec, NeurIPS 2017, algorithm 1.
    """

    parts = 2

    @staticmethod
    def adjacency(edge_index: Tensor, num_nodes: int, like: Tensor) -> SparseMatrix:
        """The adjacency with rows of sum 1."""
        matrix = _counts(edge_index, num_nodes)
        return SparseMatrix(sp.diags(1 / np.maximum(np.asarray(matrix.sum(1)).ravel(), 1)) @ matrix, like)

    def aggregate(self, x: Any, adjacency: SparseMatrix) -> Any:
        """Own features, then the neighbours' mean."""
        mean = adjacency @ x
        if isinstance(x, SparseMatrix):
            return SparseMatrix(sp.hstack([x.matrix, mean.matrix]), x.like)
        return torch.cat([x, mean], 1)


class GATConv(nn.Module):
    """Graph attention: heads of $\\sum_j \\alpha_{ij} W x_j$ side by side, each `out_features / heads` wide.

    $$\\alpha_{ij} = \\operatorname{softmax}_j \\operatorname{LeakyReLU}_{0.2}(a^\\top W x_j + b^\\top W x_i)$$

    over the neighbours of i and i itself.

    Args:
        in_features: width of `x`.
        out_features: width of the result.
        heads: number of heads.

    Raises:
        ValueError: if `heads` does not divide `out_features`.

    Reference:
        Veličković et al., ICLR 2018, equations 3 to 5.
    """

    def __init__(self, in_features: int, out_features: int, heads: int = 4) -> None:
        super().__init__()
        if out_features % whole("heads", heads, 1):
            raise ValueError(f"expected out_features to be a multiple of heads={heads}, got {out_features}")
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.source, self.target = (nn.Parameter(torch.empty(heads, out_features // heads)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for parameter in (self.weight, self.source, self.target):
            nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        n, loops = len(x), torch.arange(len(x), device=x.device)
        source, target = torch.cat([edge_index, torch.stack([loops, loops])], 1)
        h = (x @ self.weight).view(n, self.heads, -1)
        score = (h * self.source).sum(-1).index_select(0, source) + (h * self.target).sum(-1).index_select(0, target)
        score = F.leaky_relu(score, 0.2)
        where = target[:, None].expand_as(score)
        # The largest score of each node goes out of the exponent; as a constant, it changes no gradient.
        largest = score.new_full((n, self.heads), -math.inf).scatter_reduce(0, where, score.detach(), "amax")
        weight = (score - largest.index_select(0, target)).exp()
        total = torch.zeros_like(largest).index_add(0, target, weight)
        message = h.index_select(0, source) * (weight / total.index_select(0, target))[..., None]
        return torch.zeros_like(h).index_add(0, target, message).flatten(1) + self.bias


def _counts(edge_index: Tensor, num_nodes: int) -> sp.csr_matrix:
    source, target = edge_index.cpu().numpy()
    return sp.csr_matrix((np.ones(len(source)), (target, source)), shape=(num_nodes, num_nodes))


def make_conv(conv: str | ConvFactory, in_features: int, out_features: int) -> nn.Module:
    """Build a layer.

    Args:
        conv: `"gcn"`, `"sage"`, `"gat"`, or a factory `(in_features, out_features) -> module`; the module is called
            as `module(x, edge_index)`.
        in_features: width of its input.
        out_features: width of its output.

    Raises:
        TypeError: if it is neither.
        ValueError: if the name is unknown.
    """
    if isinstance(conv, str):
        named = {"gcn": GCNConv, "sage": SAGEConv, "gat": GATConv}
        return named[one_of("conv", conv, named)](in_features, out_features)
    if isinstance(conv, nn.Module) or not callable(conv):
        raise TypeError(f"expected conv to be a name or a factory (in_features, out_features) -> module, got {conv!r}")
    module = conv(in_features, out_features)
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected the factory to make a module, got {type(module).__name__}")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"expected a layer with parameters to train, got {type(module).__name__} without any")
    return module
