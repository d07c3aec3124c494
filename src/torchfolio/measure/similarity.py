"""Similarity of representations."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Centred kernel alignment with linear kernels, differentiable.

    $$\\mathrm{CKA}(K, L) = \\frac{\\mathrm{HSIC}(K, L)}{\\sqrt{\\mathrm{HSIC}(K, K)\\,\\mathrm{HSIC}(L, L)}},
      \\qquad K = X X^\\top,\\; L = Y Y^\\top.$$

    Invariant to orthogonal maps and isotropic scaling of either side, not to general linear maps.

    Args:
        x: `[N, ...]`, flattened to rows.
        y: `[N, ...]`.
        unbiased: the U-statistic of HSIC, which does not drift towards 1 with many features; needs N of at least 4.

    Returns:
        A scalar, in [0, 1] for the biased estimate.

    Raises:
        ValueError: if the numbers of examples differ or are too few.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019; unbiased: Song et al.,
        "Feature Selection via Dependence Maximization", JMLR 2012, equation 5.
    """
    x, y = _rows(x, y, 4 if unbiased else 2)
    if unbiased or x.shape[1] + y.shape[1] > 2 * len(x):
        return cka_from_kernels(x @ x.T, y @ y.T, unbiased=unbiased)
    # With few features the cross-covariances are smaller than the kernels and give the same number.
    x, y = x - x.mean(0), y - y.mean(0)
    cross = (x.T @ y).square().sum()
    return cross / ((x.T @ x).square().sum() * (y.T @ y).square().sum()).sqrt()


def rbf_cka(x: Tensor, y: Tensor, *, bandwidth: float = 0.5, unbiased: bool = False) -> Tensor:
    """Centred kernel alignment with Gaussian kernels, whose width is `bandwidth` times the median distance.

    Args:
        x: `[N, ...]`.
        y: `[N, ...]`.
        bandwidth: width over the median distance between examples.
        unbiased: see `linear_cka`.
    """
    x, y = _rows(x, y, 4 if unbiased else 2)
    return cka_from_kernels(_rbf(x, bandwidth), _rbf(y, bandwidth), unbiased=unbiased)


def cka_from_kernels(k: Tensor, l: Tensor, *, unbiased: bool = False) -> Tensor:
    """Centred kernel alignment of two kernel matrices `[N, N]`."""
    hsic = _hsic_unbiased if unbiased else _hsic
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).clamp_min(0).sqrt()


def _rbf(x: Tensor, bandwidth: float) -> Tensor:
    square = torch.cdist(x, x).square()
    n = len(x)
    off_diagonal = square.detach()[~torch.eye(n, dtype=torch.bool, device=x.device)]
    return torch.exp(-square / (2 * bandwidth**2 * off_diagonal.median()))


def _hsic(k: Tensor, l: Tensor) -> Tensor:
    k = k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()
    return (k * l).sum()


def _hsic_unbiased(k: Tensor, l: Tensor) -> Tensor:
    n = len(k)
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())
    trace = (k * l.T).sum()
    means = k.sum() * l.sum() / ((n - 1) * (n - 2))
    return (trace + means - 2 * (k.sum(0) @ l.sum(1)) / (n - 2)) / (n * (n - 3))


def _rows(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if len(x) != len(y):
        raise ValueError(f"expected features of the same examples, got {len(x)} and {len(y)}")
    if len(x) < least:
        raise ValueError(f"expected at least {least} examples, got {len(x)}")
    return x.flatten(1), y.flatten(1)
