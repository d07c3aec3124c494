"""Ways to learn filters from unlabelled patches, each a class with one `learn`.

Patches are rows `[n, d]`, whitened; the filters they give are rows `[K, d]`. Here are those that solve for filters:
axes, components, clusters, dictionaries; `filter_networks` has those that learn them step by step.

Reference:
    Collated in Hirani and Abdulla, arXiv 2410.21644. k-means: Coates and Ng 2012; convolutional k-means: Dundar et al.
    2015; independent components: Hyvarinen 1999; sparse coding: Mairal et al. 2010.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import at_least, positive, whole

__all__ = [
    "ICA", "PCA", "ConvKMeans", "KMeans", "Learner", "RandomPatches", "SparseCoding", "SphericalKMeans", "at_most",
    "seed_patches", "unit_rows",
]  # fmt: skip


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to norm 1."""
    return F.normalize(x, dim=1)


def seed_patches(x: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """K different patches of norm 1, more than there are only by drawing some again."""
    chosen = torch.randperm(len(x), generator=generator)
    return unit_rows(x[chosen.repeat(-(-K // len(x)))[:K]])


@dataclass(frozen=True)
class Learner(ABC):
    """A way to learn filters. Settings are the fields of its class.

    Attributes:
        source: kind of data that `learn` is given: `"patches"`, whitened rows `[n, d]`; `"windows"`, the whitened
            patches of windows of twice the side, `[n, shifts, d]`; or `"images"` themselves.
    """

    source = "patches"

    @abstractmethod
    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        """K filters as rows `[K, d]` (or `[K, C, k, k]` from images)."""


def at_most(K: int, d: int, name: str) -> None:
    """Refuse more filters than there are directions."""
    if d < K:
        raise ValueError(
            f"expected at most {d} filters of {name}, as many as patches vary in directions, got n_filters={K}"
        )


@dataclass(frozen=True)
class RandomPatches(Learner):
    """Patches themselves, of norm 1."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        return seed_patches(x, K, generator)


@dataclass(frozen=True)
class PCA(Learner):
    """Principal axes, whose largest entry is positive."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        at_most(K, x.shape[1], "PCA")
        axes = torch.linalg.eigh(torch.cov(x.double().mT)).eigenvectors.mT.flip(0)[:K]
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        return (axes * largest.sign()).float()


@dataclass(frozen=True)
class ICA(Learner):
    """Independent components by the symmetric fixed point of FastICA with tanh."""

    max_iter: int = 200
    tol: float = 1e-3

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        at_most(K, x.shape[1], "ICA")
        values, vectors = torch.linalg.eigh(torch.cov(x.double().mT))
        # Patches without their mean have a direction less, in which there is nothing but rounding.
        at_most(K, int((values > 1e-6 * values[-1]).sum()), "ICA")
        down = (vectors[:, -K:] / values[-K:].clamp(min=1e-12).sqrt()).float()
        z = (x - x.mean(0)) @ down
        W = _decorrelated(torch.randn(K, K, generator=generator))
        for _ in range(whole("max_iter", self.max_iter, 1)):
            g = (z @ W.mT).tanh()
            new = _decorrelated(g.mT @ z / len(z) - (1 - g.square()).mean(0)[:, None] * W)
            change = float(((new * W).sum(1).abs() - 1).abs().max())
            W = new
            if change < positive("tol", self.tol):
                break
        else:
            warnings.warn(f"FastICA did not converge to tol={self.tol} in {self.max_iter} iterations", stacklevel=2)
        return unit_rows(W @ down.mT)


def _decorrelated(W: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(W)
    return U @ Vh


@dataclass(frozen=True)
class KMeans(Learner):
    """Euclidean k-means by Lloyd's iterations, centroids brought to norm 1; empty clusters begin at random patches."""

    n_iter: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        return unit_rows(self.centroids(x, K, generator))

    def centroids(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        """The means of the clusters."""
        centers = x[torch.randperm(len(x), generator=generator).repeat(-(-K // len(x)))[:K]].clone()
        for _ in range(whole("n_iter", self.n_iter, 1)):
            winner = (x @ centers.mT - centers.square().sum(1) / 2).argmax(1)
            counts = torch.bincount(winner, minlength=K)
            sums = torch.zeros_like(centers).index_add_(0, winner, x)
            centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
            if (empty := counts == 0).any():
                centers[empty] = x[torch.randint(len(x), (int(empty.sum()),), generator=generator)]
        return centers


@dataclass(frozen=True)
class SphericalKMeans(Learner):
    """k-means of directions up to their sign: $D_j \\propto \\sum \\mathrm{sign}(s_j) x$ over the patches that j wins."""

    n_iter: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        D = seed_patches(x, K, generator)
        for _ in range(whole("n_iter", self.n_iter, 1)):
            D = _spherical_update(D, x, x @ D.mT, generator)
        return D


def _spherical_update(D: Tensor, x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    winner = s.abs().argmax(1)
    signed = x * s.gather(1, winner[:, None]).sign()
    sums = torch.zeros_like(D).index_add_(0, winner, signed)
    empty = sums.norm(dim=1) < 1e-8
    if empty.any():
        sums[empty] = x[torch.randint(len(x), (int(empty.sum()),), generator=generator)]
    return unit_rows(sums)


@dataclass(frozen=True)
class ConvKMeans(Learner):
    """Spherical k-means where each window gives the patch at the best of its positions: no shifted copies."""

    n_iter: int = 15
    source = "windows"

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        n, shifts = x.shape[:2]
        D = seed_patches(x[:, shifts // 2], K, generator)
        for _ in range(whole("n_iter", self.n_iter, 1)):
            place = (x @ D.mT).abs().amax(2).argmax(1)
            best = x[torch.arange(n), place]
            D = _spherical_update(D, best, best @ D.mT, generator)
        return D


@dataclass(frozen=True)
class SparseCoding(Learner):
    """Dictionary of $\\min \\sum \\lVert x - D^\\top a\\rVert^2/2 + \\alpha\\lVert a\\rVert_1$ with $\\lVert D_j\\rVert \\le 1$, online."""

    alpha: float = 1.0
    epochs: int = 3
    batch_size: int = 500
    n_codes: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        at_least("alpha", self.alpha, 0)
        D, d = seed_patches(x, K, generator), x.shape[1]
        A, B = torch.zeros(K, K), torch.zeros(K, d)
        for epoch in range(whole("epochs", self.epochs, 1)):
            for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                codes = self.encode(x[part], D)
                keep = 1.0 if epoch else 0.95  # the first codes are those of a bad dictionary
                A, B = keep * A + codes.mT @ codes, keep * B + codes.mT @ x[part]
                for j in range(K):
                    if A[j, j] > 1e-6:
                        D[j] += (B[j] - A[j] @ D) / A[j, j]
                        D[j] /= D[j].norm().clamp(min=1)
        dead = A.diagonal() <= 1e-6
        D[dead] = seed_patches(x, K, generator)[dead]
        return unit_rows(D)

    def encode(self, x: Tensor, D: Tensor) -> Tensor:
        """Codes by accelerated soft thresholding (FISTA)."""
        gram, cross = D @ D.mT, x @ D.mT
        step = 1 / torch.linalg.matrix_norm(gram, 2).clamp(min=1e-6)
        a = last = torch.zeros_like(cross)
        t = 1.0
        for _ in range(self.n_codes):
            b = a - step * (a @ gram - cross)
            new = b.sign() * (b.abs() - step * self.alpha).clamp(min=0)
            t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
            a, last, t = new + (t - 1) / t_next * (new - last), new, t_next
        return last
