"""Losses that compare two views of the same examples, for representations learned without labels.

All take projections `[B, d]` of two views, row by row of the same example, and give a mean over the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import positive

__all__ = ["MoCoQueue", "barlow_twins", "byol", "nt_xent", "simsiam"]

Reduction = Literal["mean", "sum", "none"]


def _pair(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.dim() != 2 or len(first) < 2:
        raise ValueError(
            f"expected two views [B, d] of the same shape with at least two examples, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"expected reduction to be 'mean', 'sum' or 'none', got {reduction!r}")
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def nt_xent(
    first: Tensor, second: Tensor, temperature: float | Tensor = 0.5, *, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of finding an example's other view among all 2B - 1 others (SimCLR, eq. 1).

    $$-\\log \\frac{\\exp(\\cos(z_i, z_{i'})/\\tau)}{\\sum_{k \\neq i} \\exp(\\cos(z_i, z_k)/\\tau)}$$

    Args:
        first: projections of one view, `[B, d]`.
        second: second moment of the other.
        temperature: $\\tau > 0$; a number or a scalar tensor.
        reduction: `"mean"`, `"sum"` or `"none"`, over the 2B views.

    Raises:
        ValueError: on other shapes, fewer than two examples, or a temperature that is not positive.
    """
    _pair(first, second)
    if not isinstance(temperature, Tensor):
        positive("temperature", temperature)
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = z @ z.T / temperature
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(first))
    return _reduced(F.cross_entropy(logits, partner, reduction="none"), reduction)


def simsiam(
    predicted: tuple[Tensor, Tensor], projected: tuple[Tensor, Tensor], *, reduction: Reduction = "mean"
) -> Tensor:
    """Negative cosine of each view's prediction with the other's projection, which gets no gradient (SimSiam, eq. 2).

    Args:
        predicted: outputs of the predictor for both views, `[B, d]` each.
        projected: outputs of the projector.
        reduction: `"mean"`, `"sum"` or `"none"`, over the examples.
    """
    (p1, p2), (z1, z2) = predicted, projected
    _pair(p1, z2)
    _pair(p2, z1)
    losses = -(F.cosine_similarity(p1, z2.detach()) + F.cosine_similarity(p2, z1.detach())) / 2
    return _reduced(losses, reduction)


def byol(predicted: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], *, reduction: Reduction = "mean") -> Tensor:
    """Squared distance of normalised predictions to the averaged network's projections, $2 - 2\\cos$ (BYOL, eq. 2).

    Args:
        predicted: predictions of the network that learns, for both views.
        target: projections of the averaged network, for both views; they get no gradient.
        reduction: `"mean"`, `"sum"` or `"none"`, over the examples; the two directions are added.
    """
    return _reduced(4 + 4 * simsiam(predicted, target, reduction="none"), reduction)


def barlow_twins(first: Tensor, second: Tensor, offdiagonal: float = 5e-3) -> Tensor:
    """Deviation of the views' cross-correlation matrix from the identity (Barlow Twins, eq. 1).

    $$\\sum_i (1 - C_{ii})^2 + \\lambda \\sum_{i \\neq j} C_{ij}^2$$

    Args:
        first: projections of one view, `[B, d]`.
        second: second moment of the other.
        offdiagonal: $\\lambda$.
    """
    _pair(first, second)
    a, b = (F.batch_norm(z, None, None, training=True) for z in (first, second))
    correlation = a.T @ b / len(a)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum() + offdiagonal * (correlation.square().sum() - diagonal.square().sum())


class MoCoQueue(nn.Module):
    """The latest keys of a slowly moving encoder, as negatives of InfoNCE (MoCo, eq. 1).

    Args:
        size: maximum number of keys.
        dim: d.
        temperature: $\\tau$.
    """

    keys: Tensor
    count: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int, temperature: float = 0.2) -> None:
        super().__init__()
        positive("size", size)
        positive("dim", dim)
        self.temperature = positive("temperature", temperature)
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Mean loss of queries `[B, d]` with their keys `[B, d]`, which get no gradient; the queue stays as it is."""
        _pair(query, key)
        q, k = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
        own = (q * k).sum(1, keepdim=True)
        logits = torch.cat([own, q @ self.keys[: int(self.count)].to(q).T], 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))

    @torch.no_grad()
    def push(self, key: Tensor) -> None:
        """Take keys `[B, d]` in, in place of the oldest."""
        size = len(self.keys)
        fresh = F.normalize(key.detach(), dim=1)[-size:].to(self.keys)
        index = (int(self.place) + torch.arange(len(fresh), device=self.keys.device)) % size
        self.keys[index] = fresh
        self.place.fill_((int(self.place) + len(fresh)) % size)
        self.count.fill_(min(size, int(self.count) + len(fresh)))
