"""Which phrases drive a classifier's hidden layer further than ordinary ones do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchfolio.checks import between, finite

__all__ = ["outlier_candidates"]


def outlier_candidates(
    hidden: Tensor, auxiliary: Tensor, quantile: float = 0.99, variance: float = 0.99
) -> tuple[Tensor, Tensor, float]:
    """How far candidates lie from ordinary phrases.

    Points are projected on the principal components that hold `variance` of all. With $m = \\lceil \\ln N \\rceil$ and
    $\\varepsilon$ the quantile of the auxiliary points' mean distances to their $m$ nearest, a candidate is noise to DBSCAN
    among the auxiliary points if it is more than $\\varepsilon$ away from all that are dense. Candidates are judged one by
    one, so that several near one another do not make a cluster of their own, in which a trigger could hide.

    Args:
        hidden: hidden states `[K, H]` of candidates.
        auxiliary: hidden states `[N, H]` of ordinary phrases.
        quantile: quantile behind the radius.
        variance: share of the variance that is kept.

    Returns:
        score `[K]`: distance to the nearest dense point over $\\varepsilon$, 0 for those that are dense themselves, so that
        noise is above 1; mean distance to the $m$ nearest over $\\varepsilon$ `[K]`; and $\\varepsilon$.

    Reference:
        Section 4.4; Ester et al., "A Density-Based Algorithm for Discovering Clusters", 1996.
    """
    between("quantile", quantile, 0, 1)
    count = math.ceil(math.log(len(auxiliary)))
    points = finite("hidden states", torch.cat([auxiliary, hidden]).double())
    points = points - points.mean(0)
    _, s, directions = torch.linalg.svd(points, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum().clamp_min(1e-300)
    points = points @ directions[: int((share < variance).sum()) + 1].T
    auxiliary, hidden = points[: len(auxiliary)], points[len(auxiliary) :]
    between_all = torch.cdist(auxiliary, auxiliary)
    own = between_all.topk(count + 1, largest=False).values[:, 1:].mean(1)  # the nearest is the point itself
    eps = max(float(own.quantile(quantile)), 1e-12)
    away = torch.cdist(hidden, auxiliary)
    neighbours = (between_all <= eps).sum(1) + 1  # with the candidate, which counts where it is in reach
    near = away.masked_fill(neighbours < count, math.inf).min(1).values / eps
    dense = (away <= eps).sum(1) + 1 >= count
    distance = away.topk(count, largest=False).values.mean(1) / eps
    return torch.where(dense, 0.0, near), distance, eps
