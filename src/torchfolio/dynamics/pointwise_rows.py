"""Least-squares rows that are pointwise functions of a few linear terms: their residuals, Jacobians and Hessians.

A row is $r(T_1 \\omega + c_1, T_2 \\omega + c_2, \\ldots)$ at one point, with linear terms (a field, its derivatives) that are
known beforehand. One backward pass through the pointwise function gives its slopes, and $J = \\sum_i r_i' \\odot T_i$.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchfolio.shown import Shown

__all__ = ["CompressedProblem", "RowProblem", "Rows"]


class Rows(NamedTuple):
    """Rows of one kind: a pointwise function of terms $T \\omega + c$.

    Attributes:
        terms: T, `[N, terms, points, K]`.
        fixed: c, `[N, terms, points]`, or none.
        names: names of the terms.
        function: function from terms by name `[N, points]` and constants to residuals `[N, points]`.
        constants: other tensors that the function needs, by name, each with N rows.
    """

    terms: Tensor
    fixed: Tensor | None
    names: tuple[str, ...]
    function: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
    constants: dict[str, Tensor]

    def values(self, w: Tensor) -> Tensor:
        """$T \\omega + c$, `[N, terms, points]`."""
        n, t, p, k = self.terms.shape
        values = (self.terms.reshape(n, t * p, k) @ w[:, :, None]).view(n, t, p)
        return values if self.fixed is None else values + self.fixed

    def residual(self, values: Tensor) -> Tensor:
        """Of the values."""
        return self.function({name: values[:, i] for i, name in enumerate(self.names)}, self.constants)

    def take(self, index: Tensor) -> Rows:
        """Those of some of the N problems."""
        fixed = None if self.fixed is None else self.fixed[index]
        constants = {name: value[index] for name, value in self.constants.items()}
        return self._replace(terms=self.terms[index], fixed=fixed, constants=constants)

    def used(self) -> Rows:
        """The same with those terms alone that the function looks at."""
        values = self.values(self.terms.new_zeros(len(self.terms), self.terms.shape[3]))
        watched = _Watched({name: values[:, i] for i, name in enumerate(self.names)})
        with torch.no_grad():
            self.function(watched, self.constants)
        columns = [i for i, name in enumerate(self.names) if name in watched.seen] or [0]
        if len(columns) == len(self.names):
            return self
        fixed = None if self.fixed is None else self.fixed[:, columns]
        return self._replace(terms=self.terms[:, columns], fixed=fixed, names=tuple(self.names[i] for i in columns))


class _Watched(dict):
    """Terms that note which of them were asked for; all of them where they are gone through."""

    def __init__(self, terms: dict[str, Tensor]) -> None:
        super().__init__(terms)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self.seen.update(super().keys())
        return super().__iter__()

    def items(self) -> Any:
        self.seen.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self.seen.update(super().keys())
        return super().values()


class RowProblem(Shown):
    """N least-squares problems made of rows of several kinds and a ridge.

    Rows that turn out to be linear are brought to K + 1 by a QR decomposition, once: a solve then evaluates only those
    that are not.

    Args:
        groups: rows of each kind.
        ridge: $\\rho$ of the rows $\\rho \\omega$.
        normalise: whether rows of a kind are divided by the square root of their number.
    """

    def __init__(self, groups: Sequence[Rows], ridge: float, normalise: bool) -> None:
        groups = [group.used() for group in groups]
        self.groups, self.ridge = groups, ridge
        self.constant = [group._replace(terms=group.terms.detach()) for group in groups]
        self.scale = [group.terms.shape[2] ** -0.5 if normalise else 1.0 for group in groups]
        self.rows = sum(group.terms.shape[2] for group in groups) + (groups[0].terms.shape[3] if ridge else 0)

    def compressed(self) -> CompressedProblem:
        """The same problems with their linear rows made few; without a graph."""
        n, k = len(self.groups[0].terms), self.groups[0].terms.shape[3]
        zero = self.groups[0].terms.new_zeros(n, k)
        matrices = [self.ridge * torch.eye(k, dtype=zero.dtype, device=zero.device).expand(n, -1, -1)]
        right, bent = [zero], []
        for group, scale in zip(self.constant, self.scale, strict=True):
            residual, slopes, _ = _slopes(group, group.values(zero), create_graph=True)
            if slopes.requires_grad:
                bent.append((group, scale))
            else:  # slopes that depend on nothing: the rows are linear
                _finite(group, residual)
                matrices.append(scale * _product(slopes, group.terms))
                right.append(scale * residual.detach())
        table = torch.cat([torch.cat(matrices, 1), torch.cat(right, 1)[:, :, None]], 2).detach()
        triangle = torch.linalg.qr(table, mode="r")[1] if table.shape[1] > k + 1 else table
        return CompressedProblem(bent, triangle[:, :, :k].contiguous(), triangle[:, :, k].contiguous())

    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """All residuals `[N, rows]` and their Jacobian `[N, rows, K]`."""
        parts = [_linearised(group, scale, w) for group, scale in zip(self.constant, self.scale, strict=True)]
        ridge = self.ridge * torch.eye(w.shape[1], dtype=w.dtype, device=w.device).expand(len(w), -1, -1)
        return torch.cat([*(r for r, _ in parts), self.ridge * w], 1), torch.cat([*(j for _, j in parts), ridge], 1)

    def gradient(self, w: Tensor) -> Tensor:
        """$\\nabla_\\omega \\varphi$, `[N, K]`, differentiable by the basis."""
        total = self.ridge**2 * w
        for group, scale in zip(self.groups, self.scale, strict=True):
            residual, slopes, _ = _slopes(group, group.values(w), create_graph=True)
            pulled = (slopes * (scale**2 * residual)[:, None]).flatten(1)
            total = total + (pulled[:, None] @ group.terms.flatten(1, 2))[:, 0]
        return total

    def hessian(self, w: Tensor, full: bool) -> Tensor:
        """$J^\\top J + \\sum_p r_p \\nabla^2 r_p$, `[N, K, K]`; without the sum if it is not to be full."""
        jacobian = self.linearise(w)[1]
        total = jacobian.mT @ jacobian
        for group, scale in zip(self.constant if full else (), self.scale, strict=False):
            residual, slopes, values = _slopes(group, group.values(w), create_graph=True)
            for i in range(len(group.names) if slopes.requires_grad else 0):
                (second,) = torch.autograd.grad(slopes[:, i].sum(), values, retain_graph=True, allow_unused=True)
                if second is not None and bool(second.any()):
                    weighted = ((scale**2 * residual)[:, None] * second).detach()
                    total = total + group.terms[:, i].mT @ _product(weighted, group.terms)
        return total.detach()


class CompressedProblem(NamedTuple):
    """What a solver iterates on.

    Attributes:
        bent: rows that are not linear, with their scale.
        matrix: matrix of the linear rows, `[N, K + 1, K]`.
        right: their residuals at 0, `[N, K + 1]`.
    """

    bent: list[tuple[Rows, float]]
    matrix: Tensor
    right: Tensor

    def linearise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals `[N, P]` and their Jacobian `[N, P, K]`."""
        parts = [_linearised(group, scale, w) for group, scale in self.bent]
        linear = self.right + (self.matrix @ w[:, :, None])[:, :, 0]
        return torch.cat([*(r for r, _ in parts), linear], 1), torch.cat([*(j for _, j in parts), self.matrix], 1)

    def take(self, index: Tensor) -> CompressedProblem:
        """Some of the N problems."""
        bent = [(group.take(index), scale) for group, scale in self.bent]
        return CompressedProblem(bent, self.matrix[index], self.right[index])


def _product(slopes: Tensor, terms: Tensor) -> Tensor:
    """$\\sum_i s_i \\odot T_i$, from `[N, terms, points]` and `[N, terms, points, K]`."""
    total = slopes[:, 0, :, None] * terms[:, 0]
    for i in range(1, terms.shape[1]):
        total.addcmul_(slopes[:, i, :, None], terms[:, i])
    return total


def _linearised(group: Rows, scale: float, w: Tensor) -> tuple[Tensor, Tensor]:
    residual, slopes, _ = _slopes(group, group.values(w))
    _finite(group, residual)
    return scale * residual, _product(scale * slopes, group.terms)


def _finite(group: Rows, residual: Tensor) -> None:
    if not bool(residual.sum().isfinite()) and not bool(residual.isfinite().all()):
        wrong = [n for i, n in enumerate(group.names) if not bool(group.terms[:, i].isfinite().all())]
        where = f"the term {wrong[0]!r} of the basis is not" if wrong else "its terms are, the residual is not"
        raise ValueError(f"expected a finite residual of the equation: {where}")


def _slopes(group: Rows, values: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals, their derivatives by the terms at the same point `[N, terms, points]`, and the terms' values."""
    with torch.enable_grad():
        values = values if create_graph and values.requires_grad else values.detach().requires_grad_()
        residual = group.residual(values)
        (slopes,) = torch.autograd.grad(residual.sum(), values, create_graph=create_graph)
    return (residual, slopes, values) if create_graph else (residual.detach(), slopes, values)
