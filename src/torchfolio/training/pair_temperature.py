"""Several projection heads as one batched product, and a temperature for every pair and head.

Lei Wang, Piotr Koniusz, Tom Gedeon, Liang Zheng, "Adaptive Multi-head Contrastive Learning", ECCV 2024,
https://arxiv.org/abs/2310.05615.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import positive, whole

__all__ = ["ConcatTemperature", "FixedTemperature", "MultiHeadProjector", "PairTemperature", "temperature_penalty"]


class MultiHeadProjector(nn.Module):
    """Perceptrons of one hidden layer, one for each head, computed as two batched products.

    Args:
        in_dim: width D of the features.
        hidden_dim: width of the hidden layer.
        out_dim: width d' of the projections.
        heads: number C of heads.

    Shapes:
        `[N, D]`, the same for all heads, or `[C, N, D]`, to `[C, N, d']`.

    Raises:
        TypeError: if a size is no whole number.
        ValueError: if a size is below 1.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, heads: int = 3) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "hidden_dim": hidden_dim, "out_dim": out_dim, "heads": heads}
        for name, size in sizes.items():
            whole(name, size, 1)
        self.heads = heads
        self.weight1, self.bias1 = _layer(heads, in_dim, hidden_dim)
        self.weight2, self.bias2 = _layer(heads, hidden_dim, out_dim)

    def forward(self, h: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.bias1, h.expand(self.heads, *h.shape[-2:]), self.weight1).relu()
        return torch.baddbmm(self.bias2, hidden, self.weight2)

    def extra_repr(self) -> str:
        return f"{self.weight1.shape[1]}, {self.weight1.shape[2]}, {self.weight2.shape[2]}, heads={self.heads}"


def _layer(heads: int, in_dim: int, out_dim: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights and biases as `nn.Linear` draws them."""
    bound = 1 / math.sqrt(in_dim)
    draw = lambda *shape: nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))  # noqa: E731
    return draw(heads, in_dim, out_dim), draw(heads, 1, out_dim)


def temperature_penalty(tau: Tensor, dim: int) -> Tensor:
    """What keeps a temperature from running away, $\\Omega(\\tau) = \\frac{d'}{2}\\log\\tau + \\frac1\\tau$.

    With unit vectors $z, z^+$, $-\\mathrm{sim}/\\tau + \\Omega(\\tau) + \\frac{d'}{2}\\log 2\\pi$ is the negative
    log-likelihood of $z^+$ under $\\mathcal{N}(z, \\tau I)$, least at $\\tau = \\|z - z^+\\|^2/d'$.

    Args:
        tau: temperatures.
        dim: width d' of the projections.
    """
    return dim / 2 * tau.log() + 1 / tau


class PairTemperature(nn.Module):
    """A temperature for every pair, from both projections, shared by the heads:

    $$\\tau_{ij} = l + (u - l)\\,\\sigma\\bigl(\\varphi(z_i)\\cdot\\varphi(z_j)/\\sqrt m\\bigr),$$

    with a perceptron $\\varphi$ of one hidden layer. It is symmetric, and all pairs cost one product.

    Args:
        dim: width d' of the projections.
        hidden: width of the hidden layer, and m.
        low: lower bound $l > 0$; without one, $1/\\tau$ explodes where the penalty weighs less than a similarity.
        high: upper bound $u > l$.

    Shapes:
        `[..., N, d']` and `[..., M, d']` to `[..., N, M]`; `paired`: twice `[..., N, d']` to `[..., N]`.

    Raises:
        ValueError: if the bounds are not positive, finite and in order.

    Reference:
        Wang et al., ECCV 2024.
    """

    def __init__(self, dim: int, hidden: int = 64, low: float = 0.05, high: float = 0.5) -> None:
        super().__init__()
        whole("dim", dim, 1)
        whole("hidden", hidden, 1)
        self.low, self.high = positive("low", low), positive("high", high)
        if not low < high:
            raise ValueError(f"expected low below high, got {low} and {high}")
        self.scale = 1 / math.sqrt(hidden)
        self.net: Any = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        q = self.code(a)
        k = q if b is a else self.code(b)
        return self._bounded(q @ k.mT)

    def paired(self, a: Tensor, b: Tensor) -> Tensor:
        """Temperatures of row i with row i."""
        return self._bounded((self.code(a) * self.code(b)).sum(-1))

    def code(self, z: Tensor) -> Tensor:
        """$\\varphi(z)/m^{1/4}$, whose dot products are the logits of temperatures."""
        return self.net(self._sized(z)) * self.scale**0.5

    def _sized(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.net[0].in_features:
            raise ValueError(
                f"expected projections of width {self.net[0].in_features} for the temperatures, got {z.shape[-1]}"
            )
        return z

    def _bounded(self, logits: Tensor) -> Tensor:
        return torch.add(logits.new_tensor(self.low), logits.sigmoid(), alpha=self.high - self.low)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"


class ConcatTemperature(PairTemperature):
    """A perceptron on both projections one after the other, as in the authors' code; not symmetric.

    Its hidden layer holds `[N, M, hidden]` numbers a head: for small batches.
    """

    def __init__(self, dim: int, hidden: int = 64, low: float = 0.05, high: float = 0.5) -> None:
        super().__init__(dim, hidden, low, high)
        self.net = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, 1)])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        first, second, last = self.net
        hidden = first(self._sized(a)).unsqueeze(-2) + second(b).unsqueeze(-3)
        return self._bounded(last(hidden.relu()).squeeze(-1))

    def paired(self, a: Tensor, b: Tensor) -> Tensor:
        first, second, last = self.net
        return self._bounded(last((first(self._sized(a)) + second(b)).relu()).squeeze(-1))


class FixedTemperature(nn.Module):
    """One temperature for all pairs and heads, which is not learnt.

    Args:
        tau: temperature.
    """

    def __init__(self, tau: float = 0.3) -> None:
        super().__init__()
        self.tau = positive("tau", tau)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.new_full((), self.tau).expand(*a.shape[:-1], b.shape[-2])

    def paired(self, a: Tensor, b: Tensor) -> Tensor:
        """Temperatures of row i with row i."""
        return a.new_full((), self.tau).expand(a.shape[:-1])
