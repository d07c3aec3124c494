"""Which filters of a bank, and how many: greedy choice by joint information, and the spectrum of patches.

The literature ranks filters one by one; choice by joint information is ours.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchfolio.checks import at_least, finite, one_of, same_length, whole
from torchfolio.layers.filter_banks import Bank
from torchfolio.layers.filter_encoding import as_images, as_labels, correlations, encode
from torchfolio.layers.patches import draw_patches, normalize_patches

__all__ = ["filter_count", "marchenko_pastur_count", "select_filters"]


@torch.no_grad()
def select_filters(
    bank: Bank,
    X: Tensor,
    y: Tensor | None = None,
    method: Literal["joint", "marginal", "spectral", "redundancy"] = "joint",
    n: int | None = None,
    tol: float = 0.01,
    seed: int = 0,
) -> tuple[list[int], list[float]]:
    """Filters of a bank, best first, and their scores.

    Args:
        bank: bank.
        X: images.
        y: labels, for `"joint"` and `"marginal"`.
        method: `"joint"`, greedily the largest gain of the Gaussian information of all chosen responses on the label,
            $\\frac12 \\log\\det(\\Sigma_{total} + 0.05 I) - \\frac12 \\log\\det(\\Sigma_{within} + 0.05 I)$;
            `"marginal"`, each filter's own mutual information with the label, which picks near copies;
            `"spectral"`, greedily the most variance that the chosen ones do not explain; `"redundancy"`, greedily the
            least correlated with the chosen ones over all shifts.
        n: number of filters; by default as many as gain `tol` (all for `"marginal"` and `"redundancy"`).
        tol: gain below which choosing ends, where `n` is not given.
        seed: seed of the estimate of `"marginal"`.

    Raises:
        ValueError: if labels are missing or all alike, there are fewer than two images, or more filters are asked for than there are.
    """
    one_of("method", method, ("joint", "marginal", "spectral", "redundancy"))
    K = len(bank)
    count = K if n is None else whole("n", n, 1, K)
    at_least("tol", tol, 0)
    if method == "redundancy":
        return _least_correlated(correlations(bank), count)
    X = as_images(X)
    if len(X) < 2:
        raise ValueError(f"expected at least two images, got {len(X)}")
    responses = encode(bank, X).sum(2).flatten(2)
    responses = (responses - responses.mean(0)) / responses.std(0).clamp(min=1e-8)
    if method == "spectral":
        return _most_variance(responses.mean(2), count, tol if n is None else None)
    if y is None:
        raise ValueError(f"expected labels for the method {method!r}, got none")
    y = as_labels(y)
    same_length(X=X, y=y)
    if len(y.unique()) < 2:
        raise ValueError(f"expected labels of at least two classes, got {len(y.unique())}")
    if method == "marginal":
        from sklearn.feature_selection import mutual_info_classif

        scores = mutual_info_classif(responses.mean(2).numpy(), y.numpy(), random_state=seed)
        order = [int(i) for i in np.argsort(-scores, kind="stable")[:count]]
        return order, [float(scores[i]) for i in order]
    return _joint(responses, y, count, tol if n is None else None)


def _joint(responses: Tensor, y: Tensor, count: int, tol: float | None) -> tuple[list[int], list[float]]:
    N, K, g = responses.shape
    flat = responses.flatten(1).double()
    means = torch.zeros(int(y.max()) + 1, flat.shape[1]).double().index_add_(0, y, flat)
    means /= torch.bincount(y).clamp(min=1)[:, None]
    total, within = (v.mT @ v / N + 0.05 * torch.eye(K * g) for v in (flat, flat - means[y]))
    chosen: list[int] = []
    gains: list[float] = []
    reached = 0.0
    while len(chosen) < count:
        rest = [k for k in range(K) if k not in chosen]
        columns = torch.tensor([[*chosen, k] for k in rest])
        index = (columns[..., None] * g + torch.arange(g)).flatten(1)
        blocks = [m[index[:, :, None], index[:, None, :]] for m in (total, within)]
        values = (torch.logdet(blocks[0]) - torch.logdet(blocks[1])) / 2
        best = int(values.argmax())
        gain = float(values[best]) - reached
        if tol is not None and gain < tol:
            break
        chosen.append(rest[best])
        gains.append(gain)
        reached = float(values[best])
    return chosen, gains


def _most_variance(responses: Tensor, count: int, tol: float | None) -> tuple[list[int], list[float]]:
    """Pivoted Cholesky of the responses' covariance; scores are shares of the variance."""
    covariance = torch.cov(responses.double().mT).reshape(responses.shape[1], -1)
    whole_variance = covariance.trace().clamp(min=1e-12)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < count:
        gain = covariance.square().sum(0) / covariance.diagonal().clamp(min=1e-9)
        gain[chosen] = -1
        best = int(gain.argmax())
        share = float(gain[best] / whole_variance)
        if tol is not None and share < tol:
            break
        chosen.append(best)
        gains.append(share)
        column = covariance[:, best] / covariance[best, best].clamp(min=1e-9).sqrt()
        covariance = covariance - torch.outer(column, column)
    return chosen, gains


def _least_correlated(correlations: Tensor, count: int) -> tuple[list[int], list[float]]:
    chosen = [int(correlations.amax(1).argmin())]
    scores = [0.0]
    while len(chosen) < count:
        worst = correlations[chosen].amax(0)
        worst[chosen] = torch.inf
        chosen.append(int(worst.argmin()))
        scores.append(float(worst.min()))
    return chosen, scores


def marchenko_pastur_count(eigenvalues: Tensor, n: int) -> int:
    """How many eigenvalues of a covariance of n samples exceed what noise gives, $\\sigma^2(1 + \\sqrt{d/n})^2$.

    $\\sigma^2$ is the median eigenvalue.
    """
    values = finite("eigenvalues", eigenvalues)
    edge = values.median() * (1 + (len(values) / whole("n", n, 1)) ** 0.5) ** 2
    return int((values > edge).sum())


def filter_count(
    X: Tensor, size: int, *, n_patches: int = 20_000, contrast: float = 0.01, seed: int = 0
) -> dict[str, float]:
    """How many filters the spectrum of normalised patches asks for.

    Args:
        X: images.
        size: side of the filters.
        n_patches: number of patches drawn.
        contrast: contrast function, see `FilterLearner`.
        seed: seed of the patches.

    Returns:
        `dimension` $Ck^2$; `n_90` and `n_99`, the fewest principal axes with 90 and 99 % of the variance;
        `participation` $(\\sum\\lambda)^2/\\sum\\lambda^2$; `marchenko_pastur`, the axes above noise.
    """
    patches = normalize_patches(draw_patches(as_images(X), size, n_patches, seed=seed), contrast)
    values = torch.linalg.eigvalsh(torch.cov(patches.double().mT).reshape(patches.shape[1], -1)).flip(0).clamp(min=0)
    shares = values.cumsum(0) / values.sum()
    return {
        "dimension": len(values),
        "n_90": int((shares < 0.90 - 1e-12).sum()) + 1,
        "n_99": int((shares < 0.99 - 1e-12).sum()) + 1,
        "participation": float(values.sum() ** 2 / values.square().sum()),
        "marchenko_pastur": marchenko_pastur_count(values, len(patches)),
    }
