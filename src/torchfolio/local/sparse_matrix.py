"""Constant sparse matrices, and what is made of them, as factors of dense ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import scipy.sparse as sp
import torch
from torch import Tensor

from torchfolio.shown import Shown

__all__ = ["Columns", "LowRank", "SparseMatrix"]


class SparseMatrix(Shown):
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


class LowRank(Shown):
    """The sum of a sparse matrix and a product of two thin ones: `sparse + left @ right`."""

    def __init__(self, sparse: SparseMatrix, left: Tensor, right: Tensor) -> None:
        self.sparse, self.left, self.right = sparse, left, right

    def __getitem__(self, rows: Tensor) -> LowRank:
        return LowRank(self.sparse[rows], self.left[rows], self.right)

    def __matmul__(self, weight: Tensor) -> Tensor:
        return self.sparse @ weight + self.left @ (self.right @ weight)


class Columns(Shown):
    """Matrices side by side, each with the rows of the weight that it meets."""

    def __init__(self, pieces: Sequence[tuple[Any, Tensor]]) -> None:
        self.pieces = list(pieces)

    def __getitem__(self, rows: Tensor) -> Columns:
        return Columns([(piece[rows], of) for piece, of in self.pieces])

    def __matmul__(self, weight: Tensor) -> Tensor:
        return sum(piece @ weight.index_select(0, of) for piece, of in self.pieces)  # pyright: ignore[reportReturnType]
