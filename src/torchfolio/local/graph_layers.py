"""Message passing on plain tensors, and layers whose inputs stay the same while they train.

GCN and GraphSAGE aggregate linearly before they transform. A layer that trains by itself on frozen inputs therefore
aggregates once: each step is one matrix product with a fixed matrix, sparse where the features are (bags of words),
and only over the nodes that the loss reads.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import one_of, whole

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

ConvFactory = Callable[[int, int], nn.Module]
SPARSE = 0.1  # share of entries that are not zero, below which features are kept sparse


class SparseMatrix:
    """A constant sparse matrix that multiplies dense ones differentiably.

    Args:
        matrix: entries, any of SciPy's sparse matrices.
        like: tensor whose device the product has.
    """

    def __init__(self, matrix: Any, like: Tensor) -> None:
        self.matrix = sp.csr_matrix(matrix)
        self.like = like.detach()[:0]
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.matrix.shape  # pyright: ignore[reportGeneralTypeIssues]
        return rows, columns

    def __getitem__(self, rows: Tensor) -> SparseMatrix:
        return SparseMatrix(self.matrix[rows.cpu().numpy()], self.like)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, SparseMatrix):
            return SparseMatrix(self.matrix @ other.matrix, self.like)
        if self._forward is None:
            self._forward, self._backward = (self._tensor(m) for m in (self.matrix, self.matrix.T))
        return _SparseProduct.apply(self._forward, self._backward, other)

    def _tensor(self, matrix: Any) -> Tensor:
        matrix = sp.csr_matrix(matrix)
        dtype = torch.float64 if self.like.dtype == torch.float64 else torch.float32
        parts = torch.from_numpy(matrix.indptr).long(), torch.from_numpy(matrix.indices).long()
        with warnings.catch_warnings():  # PyTorch calls this layout a beta; only its product is used
            warnings.filterwarnings("ignore", "Sparse", UserWarning)
            tensor = torch.sparse_csr_tensor(
                *parts, torch.from_numpy(matrix.data).to(dtype), matrix.shape, check_invariants=False
            )
        return tensor.to(self.like.device)


class _SparseProduct(torch.autograd.Function):
    """The product with a constant; nothing needs to be saved but the constant itself."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        ctx.transposed = transposed
        return (matrix @ dense.to(matrix.dtype)).to(dense.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return None, None, (ctx.transposed @ grad.to(ctx.transposed.dtype).contiguous()).to(grad.dtype)


class LowRank:
    """The sum of a sparse matrix and a product of two thin ones: `sparse + left @ right`."""

    def __init__(self, sparse: SparseMatrix, left: Tensor, right: Tensor) -> None:
        self.sparse, self.left, self.right = sparse, left, right

    def __getitem__(self, rows: Tensor) -> LowRank:
        return LowRank(self.sparse[rows], self.left[rows], self.right)

    def __matmul__(self, weight: Tensor) -> Tensor:
        return self.sparse @ weight + self.left @ (self.right @ weight)


class Columns:
    """Matrices side by side, each with the rows of the weight that it meets."""

    def __init__(self, pieces: Sequence[tuple[Any, Tensor]]) -> None:
        self.pieces = list(pieces)

    def __getitem__(self, rows: Tensor) -> Columns:
        return Columns([(piece[rows], of) for piece, of in self.pieces])

    def __matmul__(self, weight: Tensor) -> Tensor:
        return sum(piece @ weight.index_select(0, of) for piece, of in self.pieces)  # pyright: ignore[reportReturnType]


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


def normalize_rows(x: Tensor) -> Tensor:
    """Rows over their norms, $\\nu(x) = x / (\\lVert x \\rVert_2 + 10^{-8})$; rows of zeros stay."""
    return x / (x.norm(dim=1, keepdim=True) + 1e-8)


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


class FrozenLayer:
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
