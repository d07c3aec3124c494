"""Extreme eigenvalues of a symmetric matrix that is known by its products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchfolio.measure.hessian import Product
from torchfolio.shown import Shown

Which = Literal["largest", "smallest", "magnitude", "both"]


# A warm start must also find an eigenvector that has overtaken the earlier ones, orthogonal to them all: it
# begins with so much noise, relative, and is not believed before so many products.
_NOISE = 0.3


_WARM_PRODUCTS = 6


@dataclass(frozen=True, repr=False)
class Eigen(Shown):
    """Eigenvalues and eigenvectors of a symmetric matrix.

    Attributes:
        values: `[k]`, largest first (in magnitude, where that was asked for).
        vectors: `[n, k]`, orthonormal columns; their signs mean nothing.
        residuals: $\\lVert A v - \\lambda v \\rVert$ `[k]`; an eigenvalue lies within it of each value.
        products: number of products with the matrix that it took.
        converged: whether all residuals are below the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


class _Krylov:
    """An orthonormal basis that grows by one product at a time, and the matrix in it."""

    def __init__(self, product: Product, start: Tensor, generator: torch.Generator | None) -> None:
        self.product, self.generator = product, generator
        self.n = len(start)
        self.basis = start.new_empty(0, self.n)
        self.size = 0
        self.alphas: list[float] = []
        self.betas: list[float] = []  # the last one couples to the vector that is to come
        self._next = start / start.norm()

    def grow(self) -> None:
        if self.size == len(self.basis):
            room = self.basis.new_empty(min(max(8, self.size), self.n - self.size), self.n)
            self.basis = torch.cat([self.basis, room])
        self.basis[self.size] = self._next
        self.size += 1
        w = self.product(self._next).detach()
        if not w.norm().isfinite():
            raise ValueError("a product with the matrix is not finite")
        self.alphas.append(float(self._next @ w))
        w = self._orthogonal(w)
        beta = float(w.norm())
        scale = max(map(abs, self.alphas + self.betas))
        if self.size < self.n and beta <= self.n**0.5 * torch.finfo(w.dtype).eps * scale:
            # The space is invariant: a fresh direction finds eigenvalues that the start had no part in.
            beta, w = 0.0, self._orthogonal(_random(w, self.generator))
        self.betas.append(beta)
        self._next = w / w.norm()

    def _orthogonal(self, w: Tensor) -> Tensor:
        known = self.basis[: self.size]
        for _ in range(2):  # twice is enough (Parlett)
            w = w - known.T @ (known @ w)
        return w

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, their vectors in the basis, and their residuals."""
        t = torch.diag(torch.tensor(self.alphas, dtype=torch.float64))
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(t + torch.diag(off, 1) + torch.diag(off, -1))
        coupling = self.betas[-1] if self.size < self.n else 0.0
        return values, vectors, (coupling * vectors[-1]).abs()


def lanczos(
    product: Product,
    n: int,
    k: int = 1,
    *,
    which: Which = "largest",
    iterations: int | None = None,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Eigen:
    """Extreme eigenvalues of a symmetric matrix known by its products, with full reorthogonalisation.

    After $m$ products the matrix is $T = Q^\\top A Q$ in an orthonormal basis $Q$ of the Krylov space of the
    start, tridiagonal; eigenpairs $(\\lambda, s)$ of $T$ give $(\\lambda, Q s)$ with residual
    $\\beta_m |s_m|$. An eigenvalue is off by at most its residual, and by about the residual's square over
    the gap to its neighbour.

    Args:
        product: $v \\mapsto A v$ on vectors `[n]`.
        n: size of the matrix.
        k: number of eigenvalues.
        which: `"largest"` or `"smallest"` algebraically, largest in `"magnitude"`, or `"both"` ends (half of
            k from each, the odd one from the top).
        iterations: maximum number of products; `min(n, max(20 k, 100))` by default. Their vectors are held in memory.
        tolerance: residual over the largest eigenvalue in magnitude, below which every one must be to stop.
        start: earlier eigenvectors `[n]` or `[n, j]` of a matrix that has changed a little. Noise is added
            and at least 6 products are made, so that an eigenvector that has overtaken them is found.
        generator: source of the random start or noise (on the CPU).
        device: device of the vectors.
        dtype: dtype of the vectors.

    Returns:
        The eigenpairs; `converged` tells whether the tolerance was met. Of a repeated eigenvalue one copy is
        found until the basis spans an invariant space.

    Raises:
        ValueError: if k or `iterations` are out of range, `which` is unknown, the start does not fit, or a
            product is not finite.

    Reference:
        Lanczos 1950; Parlett, "The Symmetric Eigenvalue Problem", 1980, chapter 13.
    """
    if not 1 <= k <= n:
        raise ValueError(f"expected k between 1 and {n}, got {k}")
    if which not in ("largest", "smallest", "magnitude", "both"):
        raise ValueError(f"expected which to be largest, smallest, magnitude or both, got {which!r}")
    most = min(n, max(20 * k, 100) if iterations is None else iterations)
    if most < k:
        raise ValueError(f"expected at least {k} iterations for {k} eigenvalues, got {iterations}")
    least = k if start is None else min(max(k, _WARM_PRODUCTS), most)
    krylov = _Krylov(product, _start(start, torch.empty(n, device=device, dtype=dtype), generator), generator)
    while True:
        krylov.grow()
        if krylov.size < least:
            continue
        values, ritz, residuals = krylov.ritz()
        chosen = _choose(values, which, k)
        converged = bool((residuals[chosen] <= tolerance * values.abs().max()).all())
        if converged or krylov.size == most:
            break
    vectors = krylov.basis[: krylov.size].T @ ritz[:, chosen].to(krylov.basis)
    pairs = values[chosen].to(vectors), vectors, residuals[chosen].to(vectors)
    return Eigen(*pairs, products=krylov.size, converged=converged)


def _random(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn on the CPU, so that a seed gives the same start on every device.
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _start(start: Tensor | None, like: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = _random(like, generator)
    if start is None:
        return noise
    if start.dim() not in (1, 2) or len(start) != len(like):
        raise ValueError(f"expected a start of {len(like)} rows, got shape {tuple(start.shape)}")
    warm = start.detach().to(like).reshape(len(like), -1).sum(1)
    if not (warm.isfinite().all() and warm.norm() > 0):
        raise ValueError("expected a start that is finite and not zero")
    return warm / warm.norm() + _NOISE * noise / noise.norm()


def _choose(values: Tensor, which: Which, k: int) -> Tensor:
    """Indices of the wanted values among values in ascending order, largest first."""
    m = len(values)
    if which == "magnitude":
        return values.abs().argsort(descending=True)[:k]
    low = {"largest": 0, "smallest": k, "both": k // 2}[which]
    return torch.tensor([*range(m - 1, m - 1 - (k - low), -1), *range(low - 1, -1, -1)], dtype=torch.long)
