"""Ways to learn filters step by step, as the weights of small networks: Hebbian, competitive, and by gradients.

Reference:
    Collated in Hirani and Abdulla, arXiv 2410.21644. Sanger 1989; conscience: DeSieno 1988; soft winner-take-all: Journe
    et al. 2023; maps: Kohonen 1982; winner-take-all autoencoders: Makhzani and Frey 2015; rotations: Gidaris et al. 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import positive, whole
from torchfolio.engine.modes import seeded
from torchfolio.layers.filter_learning import Learner, at_most, seed_patches, unit_rows

__all__ = ["SOM", "WTA", "Autoencoder", "ConvWTA", "Hebbian", "Rotations", "SoftWTA"]


def _batches(n: int, epochs: int, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, float]]:
    """Indices of batches in random order, epoch by epoch, each with the share of the training that is done."""
    step, steps = 0, whole("epochs", epochs, 1) * -(-n // batch_size)
    for _ in range(epochs):
        for part in torch.randperm(n, generator=generator).split(batch_size):
            yield part, step / steps
            step += 1


@dataclass(frozen=True)
class Hebbian(Learner):
    """Sanger's rule $\\Delta D = \\eta (y x^\\top - \\mathrm{LT}(y y^\\top) D)$: rows turn to the principal axes in their order."""

    lr: float = 0.02
    epochs: int = 10
    batch_size: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        at_most(K, x.shape[1], "Sanger's rule")
        x = x - x.mean(0)
        D = unit_rows(torch.randn(K, x.shape[1], generator=generator))
        lr = positive("lr", self.lr) / x.square().sum(1).mean().clamp(min=1e-12) * x.shape[1] ** 0.5
        for part, done in _batches(len(x), self.epochs, self.batch_size, generator):
            y = x[part] @ D.mT
            D = D + lr * (1 - done) * (y.mT @ x[part] - (y.mT @ y).tril() @ D) / len(part)
        return unit_rows(D)


@dataclass(frozen=True)
class WTA(Learner):
    """The winner by angle moves to the patch; frequent winners are handicapped (conscience), so that none dies."""

    lr: float = 0.1
    epochs: int = 5
    conscience: float = 0.1
    batch_size: int = 50

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        D, share = seed_patches(x, K, generator), torch.full((K,), 1 / K)
        units = unit_rows(x)
        for part, done in _batches(len(x), self.epochs, self.batch_size, generator):
            wins = F.one_hot((units[part] @ unit_rows(D).mT - self.conscience * (K * share - 1)).argmax(1), K).float()
            share = 0.95 * share + 0.05 * wins.mean(0)
            counts = wins.sum(0)[:, None]
            # As many small steps as patches that were won.
            weight = 1 - (1 - positive("lr", self.lr) * (1 - done)) ** counts
            D = D + weight * (wins.mT @ x[part] / counts.clamp(min=1) - D)
        return unit_rows(D)


@dataclass(frozen=True)
class SoftWTA(Learner):
    """SoftHebb: $\\Delta D_k = \\eta y_k (x - u_k D_k)$ with $y = \\mathrm{softmax}(u/T)$, negative for all but the winner."""

    lr: float = 0.05
    epochs: int = 5
    temperature: float = 1.0
    batch_size: int = 20

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        D = unit_rows(torch.randn(K, x.shape[1], generator=generator))
        units = unit_rows(x) * x.norm(dim=1).mean()
        for part, done in _batches(len(x), self.epochs, self.batch_size, generator):
            u = units[part] @ D.mT
            y = (u / positive("temperature", self.temperature)).softmax(1)
            y = torch.where(F.one_hot(u.argmax(1), K).bool(), y, -y)
            lr = positive("lr", self.lr) * (1 - done)
            D = D + lr * (y.mT @ units[part] - (y * u).sum(0)[:, None] * D) / len(part)
        return unit_rows(D)


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
        D, first = seed_patches(x, K, generator), max(rows, K // rows) / 2
        for part, done in _batches(len(x), self.epochs, self.batch_size, generator):
            sigma = first * (0.5 / max(first, 0.5)) ** done
            best = (x[part] @ D.mT - D.square().sum(1) / 2).argmax(1)
            near = (-far[best] / (2 * sigma**2)).exp() * positive("lr", self.lr) * 0.02**done
            D = D + (near.mT @ x[part] - near.sum(0)[:, None] * D) / len(part)
        return unit_rows(D)


@dataclass(frozen=True)
class Autoencoder(Learner):
    """A sparse autoencoder: tied weights, ReLU, an L1 penalty on the codes."""

    sparsity: float = 0.1
    lr: float = 3e-3
    epochs: int = 5
    batch_size: int = 100

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        D = unit_rows(torch.randn(K, x.shape[1], generator=generator)).requires_grad_()
        bias, out = torch.zeros(K, requires_grad=True), torch.zeros(x.shape[1], requires_grad=True)
        optimizer = torch.optim.Adam([D, bias, out], positive("lr", self.lr))
        with torch.enable_grad():
            for part, _ in _batches(len(x), self.epochs, self.batch_size, generator):
                codes = (x[part] @ D.mT + bias).relu()
                loss = (codes @ D + out - x[part]).square().sum(1).mean() / 2 + self.sparsity * codes.sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return unit_rows(D.detach())


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
            for part, _ in _batches(len(x), self.epochs, self.batch_size, generator):
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
            for part, _ in _batches(len(x), self.epochs, self.batch_size, generator):
                turned = torch.cat([x[part].rot90(k, (2, 3)) for k in range(4)])
                loss = F.cross_entropy(net(turned), torch.arange(4).repeat_interleave(len(part)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return first.weight.detach()
