"""Ways to learn filters from unlabelled patches, each a class with one `learn`.

Patches are rows `[n, d]`, whitened; the filters they give are rows `[K, d]`. Longer than most: it holds the fourteen
methods that the survey and its neighbours name, a few lines each.

Reference:
    Collated in Hirani and Abdulla, arXiv 2410.21644. k-means: Coates and Ng 2012; convolutional k-means: Dundar et al.
    2015; independent components: Hyvarinen 1999; sparse coding: Mairal et al. 2010; Sanger 1989; conscience: DeSieno
    1988; soft winner-take-all: Journe et al. 2023; maps: Kohonen 1982; winner-take-all autoencoders: Makhzani and Frey
    2015; rotations: Gidaris et al. 2018.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, positive, whole
from torchfolio.engine.modes import seeded

__all__ = [
    "ICA", "PCA", "SOM", "WTA", "Autoencoder", "ConvKMeans", "ConvWTA", "Hebbian", "KMeans", "Learner", "RandomPatches",
    "Rotations", "SoftWTA", "SparseCoding", "SphericalKMeans",
]  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def _seeds_of(x: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """K different patches of norm 1, more than there are only by drawing some again."""
    chosen = torch.randperm(len(x), generator=generator)
    return _rows(x[chosen.repeat(-(-K // len(x)))[:K]])


@dataclass(frozen=True)
class Learner(ABC):
    """A way to learn filters. Settings are the fields of its class.

    Attributes:
        source: what `learn` is given: `"patches"`, whitened rows `[n, d]`; `"windows"`, the whitened patches of windows of
            twice the side, `[n, shifts, d]`; or `"images"` themselves.
    """

    source = "patches"

    @abstractmethod
    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        """K filters as rows `[K, d]` (or `[K, C, k, k]` from images)."""


def _at_most(K: int, d: int, name: str) -> None:
    if d < K:
        raise ValueError(
            f"expected at most {d} filters of {name}, as many as patches vary in directions, got n_filters={K}"
        )


@dataclass(frozen=True)
class RandomPatches(Learner):
    """Patches themselves, of norm 1."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        return _seeds_of(x, K, generator)


@dataclass(frozen=True)
class PCA(Learner):
    """Principal axes, whose largest entry is positive."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        _at_most(K, x.shape[1], "PCA")
        axes = torch.linalg.eigh(torch.cov(x.double().mT)).eigenvectors.mT.flip(0)[:K]
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        return (axes * largest.sign()).float()


@dataclass(frozen=True)
class ICA(Learner):
    """Independent components by the symmetric fixed point of FastICA with tanh."""

    max_iter: int = 200
    tol: float = 1e-3

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        _at_most(K, x.shape[1], "ICA")
        values, vectors = torch.linalg.eigh(torch.cov(x.double().mT))
        # Patches without their mean have a direction less, in which there is nothing but rounding.
        _at_most(K, int((values > 1e-6 * values[-1]).sum()), "ICA")
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
        return _rows(W @ down.mT)


def _decorrelated(W: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(W)
    return U @ Vh


@dataclass(frozen=True)
class KMeans(Learner):
    """Euclidean k-means by Lloyd's iterations, centroids brought to norm 1; empty clusters begin at random patches."""

    n_iter: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        return _rows(self.centroids(x, K, generator))

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
        D = _seeds_of(x, K, generator)
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
    return _rows(sums)


@dataclass(frozen=True)
class ConvKMeans(Learner):
    """Spherical k-means where each window gives the patch at the best of its positions: no shifted copies."""

    n_iter: int = 15
    source = "windows"

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        n, shifts = x.shape[:2]
        D = _seeds_of(x[:, shifts // 2], K, generator)
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
        D, d = _seeds_of(x, K, generator), x.shape[1]
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
        D[dead] = _seeds_of(x, K, generator)[dead]
        return _rows(D)

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


@dataclass(frozen=True)
class Hebbian(Learner):
    """Sanger's rule $\\Delta D = \\eta (y x^\\top - \\mathrm{LT}(y y^\\top) D)$: rows turn to the principal axes in their order."""

    lr: float = 0.02
    epochs: int = 10
    batch_size: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        _at_most(K, x.shape[1], "Sanger's rule")
        x = x - x.mean(0)
        D = _rows(torch.randn(K, x.shape[1], generator=generator))
        lr = positive("lr", self.lr) / x.square().sum(1).mean().clamp(min=1e-12) * x.shape[1] ** 0.5
        steps, step = self.epochs * -(-len(x) // self.batch_size), 0
        for _ in range(whole("epochs", self.epochs, 1)):
            for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                y = x[part] @ D.mT
                D = D + lr * (1 - step / steps) * (y.mT @ x[part] - (y.mT @ y).tril() @ D) / len(part)
                step += 1
        return _rows(D)


@dataclass(frozen=True)
class WTA(Learner):
    """The winner by angle moves to the patch; frequent winners are handicapped (conscience), so that none dies."""

    lr: float = 0.1
    epochs: int = 5
    conscience: float = 0.1
    batch_size: int = 50

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        D, share = _seeds_of(x, K, generator), torch.full((K,), 1 / K)
        units = _rows(x)
        steps, step = self.epochs * -(-len(x) // self.batch_size), 0
        for _ in range(whole("epochs", self.epochs, 1)):
            for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                wins = F.one_hot((units[part] @ _rows(D).mT - self.conscience * (K * share - 1)).argmax(1), K).float()
                share = 0.95 * share + 0.05 * wins.mean(0)
                counts = wins.sum(0)[:, None]
                # As many small steps as patches that were won.
                weight = 1 - (1 - positive("lr", self.lr) * (1 - step / steps)) ** counts
                D = D + weight * (wins.mT @ x[part] / counts.clamp(min=1) - D)
                step += 1
        return _rows(D)


@dataclass(frozen=True)
class SoftWTA(Learner):
    """SoftHebb: $\\Delta D_k = \\eta y_k (x - u_k D_k)$ with $y = \\mathrm{softmax}(u/T)$, negative for all but the winner."""

    lr: float = 0.05
    epochs: int = 5
    temperature: float = 1.0
    batch_size: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        D = _rows(torch.randn(K, x.shape[1], generator=generator))
        units = _rows(x) * x.norm(dim=1).mean()
        steps, step = self.epochs * -(-len(x) // self.batch_size), 0
        for _ in range(whole("epochs", self.epochs, 1)):
            for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                u = units[part] @ D.mT
                y = (u / positive("temperature", self.temperature)).softmax(1)
                y = torch.where(F.one_hot(u.argmax(1), K).bool(), y, -y)
                lr = positive("lr", self.lr) * (1 - step / steps)
                D = D + lr * (y.mT @ units[part] - (y * u).sum(0)[:, None] * D) / len(part)
                step += 1
        return _rows(D)


@dataclass(frozen=True)
class SOM(Learner):
    """A self-organising map: the best unit and its neighbours on a grid move to the patch."""

    lr: float = 0.5
    epochs: int = 3
    batch_size: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        rows = max(r for r in range(1, int(K**0.5) + 1) if K % r == 0)
        grid = torch.stack([torch.arange(K) // (K // rows), torch.arange(K) % (K // rows)], 1).float()
        far = torch.cdist(grid, grid).square()
        D, first = _seeds_of(x, K, generator), max(rows, K // rows) / 2
        steps, step = self.epochs * -(-len(x) // self.batch_size), 0
        for _ in range(whole("epochs", self.epochs, 1)):
            for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                share = step / steps
                sigma = first * (0.5 / max(first, 0.5)) ** share
                best = (x[part] @ D.mT - D.square().sum(1) / 2).argmax(1)
                near = (-far[best] / (2 * sigma**2)).exp() * positive("lr", self.lr) * 0.02**share
                D = D + (near.mT @ x[part] - near.sum(0)[:, None] * D) / len(part)
                step += 1
        return _rows(D)


@dataclass(frozen=True)
class Autoencoder(Learner):
    """A sparse autoencoder: tied weights, ReLU, an L1 penalty on the codes."""

    sparsity: float = 0.1
    lr: float = 3e-3
    epochs: int = 5
    batch_size: int = 100

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        D = _rows(torch.randn(K, x.shape[1], generator=generator)).requires_grad_()
        bias, out = torch.zeros(K, requires_grad=True), torch.zeros(x.shape[1], requires_grad=True)
        optimizer = torch.optim.Adam([D, bias, out], positive("lr", self.lr))
        with torch.enable_grad():
            for _ in range(whole("epochs", self.epochs, 1)):
                for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                    codes = (x[part] @ D.mT + bias).relu()
                    loss = (codes @ D + out - x[part]).square().sum(1).mean() / 2 + self.sparsity * codes.sum(1).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return _rows(D.detach())


@dataclass(frozen=True)
class ConvWTA(Learner):
    """A convolutional autoencoder that keeps the largest activation of every map and builds the image from these."""

    size: int = 5
    lr: float = 3e-3
    epochs: int = 3
    batch_size: int = 100
    source = "images"

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        x = x - x.mean((2, 3), keepdim=True)
        encoder = 0.1 * torch.randn(K, x.shape[1], self.size, self.size, generator=generator)
        weights = [encoder.requires_grad_(), encoder.detach().clone().requires_grad_()]
        optimizer = torch.optim.Adam(weights, positive("lr", self.lr))
        with torch.enable_grad():
            for _ in range(whole("epochs", self.epochs, 1)):
                for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                    maps = F.conv2d(x[part], weights[0]).relu()
                    winners = maps * (maps == maps.amax((2, 3), keepdim=True))
                    loss = (F.conv_transpose2d(winners, weights[1]) - x[part]).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return weights[0].detach()


@dataclass(frozen=True)
class Rotations(Learner):
    """The first layer of a small network that tells by how many quarters an image was turned."""

    size: int = 5
    lr: float = 2e-3
    epochs: int = 3
    batch_size: int = 50
    source = "images"

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        with seeded(int(torch.randint(2**31, (), generator=generator))), torch.enable_grad():
            first = nn.Conv2d(x.shape[1], K, self.size, padding=self.size // 2)
            net = nn.Sequential(
                first, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(K, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                nn.Flatten(), nn.Linear(128, 4),
            )  # fmt: skip
            optimizer = torch.optim.Adam(net.parameters(), positive("lr", self.lr))
            x = (x - x.mean()) / x.std().clamp(min=1e-6)
            for _ in range(whole("epochs", self.epochs, 1)):
                for part in torch.randperm(len(x), generator=generator).split(self.batch_size):
                    turned = torch.cat([x[part].rot90(k, (2, 3)) for k in range(4)])
                    loss = F.cross_entropy(net(turned), torch.arange(4).repeat_interleave(len(part)))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return first.weight.detach()
