"""Gaussian clusters labelled like XOR, of any dimension: the points are drawn in blocks of features as they are used.

The data of Xu et al., "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data", ICLR 2024,
https://arxiv.org/abs/2310.02541, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchfolio.checks import at_least, between, one_of, whole
from torchfolio.shown import Shown

__all__ = ["XORClusters", "draw_seed", "normal_blocks", "xor_clusters"]

BLOCK = 4096  # features at a time; a part of what a seed means, since every block has a generator of its own


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for `normal_blocks`, drawn with a generator or torch's global one."""
    return int(torch.randint(2**31, (), generator=generator))


def normal_blocks(rows: int, columns: int, seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Standard normal numbers `[rows, columns]` in blocks of columns, the same ones whenever they are asked for."""
    for k, start in enumerate(range(0, columns, BLOCK)):
        generator = torch.Generator().manual_seed(seed + k)
        yield torch.randn(rows, min(BLOCK, columns - start), generator=generator, dtype=dtype)


@dataclass(frozen=True, eq=False, repr=False)
class XORClusters(Shown):
    """Points of four Gaussian clusters labelled like XOR; see `xor_clusters`.

    Attributes:
        y: labels to train on, -1 or 1, some of them flipped, `[n]`.
        clean: labels before the flips, `[n]`.
        cluster: index of the cluster, 0 to 3 for $+\\mu_1, -\\mu_1, +\\mu_2, -\\mu_2$, `[n]`.
        mu: norm of the means; $\\mu_1$ lies along the first axis, $\\mu_2$ along the second.
        num_features: dimension $p$.
        noise_rate: probability with which a label was flipped.
        seed: seed of the points' noise.
    """

    y: Tensor
    clean: Tensor
    cluster: Tensor
    mu: float
    num_features: int
    noise_rate: float
    seed: int

    def __len__(self) -> int:
        return len(self.y)

    def blocks(self) -> Iterator[Tensor]:
        """The points in blocks of 4,096 features, drawn anew (and equal) each time unless `x` was asked for before."""
        if "x" in self.__dict__:
            yield from self.x.split(BLOCK, 1)
            return
        signs = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).to(self.y)
        for k, noise in enumerate(normal_blocks(len(self), self.num_features, self.seed, self.y.dtype)):
            block = noise.to(self.y.device)
            if k == 0:
                block[:, :2] += self.mu * signs[self.cluster]
            yield block

    @cached_property
    def x(self) -> Tensor:
        """The points `[n, p]`, in memory from now on."""
        return torch.cat(list(self.blocks()), 1)

    @property
    def means(self) -> Tensor:
        """$\\mu_1$ and $\\mu_2$, `[2, p]`."""
        return self.mu * torch.eye(2, self.num_features, dtype=self.y.dtype, device=self.y.device)

    @property
    def flipped(self) -> Tensor:
        """Where the label is not the clean one, `[n]`."""
        return self.y != self.clean


def xor_clusters(
    n: int,
    p: int,
    mu: float,
    noise_rate: float = 0.0,
    *,
    balanced: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> XORClusters:
    """Draw points from $N(\\pm\\mu_1, I)$, labelled 1, and $N(\\pm\\mu_2, I)$, labelled -1, with $\\mu_1 \\perp \\mu_2$.

    Args:
        n: number of points.
        p: dimension, at least 2.
        mu: norm of the means, at least 0.
        noise_rate: probability with which a label is flipped, at least 0 and below 0.5; 0 for test data.
        balanced: equal numbers of points, and of flipped labels to the nearest whole number, in every cluster, in place
            of the paper's independent draws. Unequal counts leave an odd part in the function which, below about a
            thousand points, hides the effect on some seeds.
        generator: CPU generator to draw with; torch's global one by default.
        dtype: type of points and labels, float32 or float64.
        device: device of points and labels; the draw does not depend on it.

    Raises:
        ValueError: if an argument is out of range, or `n` is no multiple of 4 where `balanced`.

    Example:
        >>> data = xor_clusters(200, 1_000_000, mu=30.0, noise_rate=0.1, balanced=True)
        >>> len(data), data.num_features, int(data.flipped.sum())
        (200, 1000000, 20)

    Reference:
        Xu et al., ICLR 2024, section 2.
    """
    whole("n", n, 1)
    whole("p", p, 2)
    at_least("mu", mu, 0)
    between("noise_rate", noise_rate, 0, 0.5, inclusive=(True, False))
    one_of("dtype", dtype, (torch.float32, torch.float64))
    if balanced and n % 4:
        raise ValueError(f"expected n to be a multiple of 4 for balanced clusters, got {n}")
    # A point of random rank within its cluster: the first ones are flipped.
    order = torch.randperm(n, generator=generator)
    cluster = order % 4 if balanced else torch.randint(4, (n,), generator=generator)
    independent = torch.rand(n, generator=generator) < noise_rate
    flipped = order // 4 < round(noise_rate * n / 4) if balanced else independent
    clean = torch.where(cluster < 2, 1.0, -1.0).to(dtype)
    y = torch.where(flipped, -clean, clean).to(device)
    return XORClusters(y, clean.to(device), cluster.to(device), float(mu), p, float(noise_rate), draw_seed(generator))
