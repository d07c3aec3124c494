"""How much frozen features tell: linear probe, nearest neighbours, retrieval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1024  # queries compared with the gallery at a time


def linear_probe(
    features: Tensor,
    y: Tensor,
    test_features: Tensor,
    test_y: Tensor,
    *,
    regularization: float = 1.0,
    max_iter: int = 200,
) -> float:
    """Test accuracy of a logistic regression on standardised features.

    Args:
        features: `[N, ...]`, flattened to rows.
        y: labels `[N]`.
        test_features: `[M, ...]`.
        test_y: labels `[M]`.
        regularization: inverse strength C of the L2 penalty.
        max_iter: maximum number of iterations of the solver (L-BFGS); it warns when that was not enough.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: on shapes that do not fit, no examples, values that are not finite, or a single class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (train, y), (test, test_y) = _rows(features, y), _rows(test_features, test_y)
    _check_width(train, test)
    if len(y.unique()) < 2:
        raise ValueError(f"expected examples of at least two classes, got only class {y[0].item()}")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=regularization, max_iter=max_iter))
    probe.fit(_numpy(train), y.cpu().numpy())
    return float(probe.score(_numpy(test), test_y.cpu().numpy()))


def knn_accuracy(
    features: Tensor,
    y: Tensor,
    test_features: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float | None = None,
) -> float:
    """Test accuracy of the vote of the k nearest training examples by cosine.

    Args:
        features: `[N, ...]`, flattened to rows.
        y: labels `[N]`, from 0.
        test_features: `[M, ...]`.
        test_y: labels `[M]`.
        k: neighbours; at most N.
        temperature: weigh a vote by $\\exp(\\cos / T)$ (0.1 is usual); `None` counts votes, a tie going to
            the smallest label.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: on shapes that do not fit, no examples, values that are not finite, or k out of range.

    Reference:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
        section 3.4.
    """
    (train, y), (test, test_y) = _rows(features, y), _rows(test_features, test_y)
    _check_width(train, test)
    if not 1 <= k <= len(train):
        raise ValueError(f"expected k between 1 and {len(train)}, got {k}")
    if y.min() < 0:
        raise ValueError(f"expected labels from 0, got {int(y.min())}")
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes, right = int(y.max()) + 1, 0
    for part, label in zip(test.split(_CHUNK), test_y.split(_CHUNK), strict=True):
        cosine, nearest = (part @ train.T).topk(k, dim=1)
        # The largest exponent is taken out before it can overflow.
        weight = torch.ones_like(cosine) if temperature is None else ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(part), classes).scatter_add_(1, y.to(nearest.device)[nearest], weight)
        right += int((votes.argmax(1) == label.to(votes.device)).sum())
    return right / len(test)


class Retrieval(NamedTuple):
    """Quality of a ranking.

    Attributes:
        top1: share of queries whose nearest item has their label.
        top5: share of queries with one of their label among the nearest five.
        mean_average_precision: mean over queries of the average precision of the whole ranking.
        queries: number of queries that counted.
    """

    top1: float
    top5: float
    mean_average_precision: float
    queries: int


def retrieval(
    query: Tensor, query_y: Tensor, gallery: Tensor, gallery_y: Tensor, *, exclude_self: bool = False
) -> Retrieval:
    """Rank a gallery by inner product with each query and see where the items of its label stand.

    Normalise the features first where the cosine is meant. Average precision of a query with $R$ relevant
    items at ranks $r_1 < … < r_R$: $\\frac1R \\sum_i i / r_i$.

    Args:
        query: `[Q, D]`.
        query_y: labels `[Q]`.
        gallery: `[G, E]`; where D and E differ, the first min(D, E) coordinates are compared.
        gallery_y: labels `[G]`.
        exclude_self: query i is item i of the gallery and left out of its own ranking.

    Returns:
        Rates in [0, 1], over the queries that have a relevant item.

    Raises:
        ValueError: on shapes that do not fit, values that are not finite, or no query with a relevant item.
    """
    (items, query_y), (stored, gallery_y) = _rows(query, query_y), _rows(gallery, gallery_y)
    if exclude_self and len(items) != len(stored):
        raise ValueError(f"expected the queries to be the gallery, got {len(items)} and {len(stored)}")
    width = min(items.shape[1], stored.shape[1])
    items, stored = items[:, :width], stored[:, :width]
    gallery_y = gallery_y.to(stored.device)
    totals, queries = np.zeros(3), 0
    for start in range(0, len(items), _CHUNK):
        labels = query_y[start : start + _CHUNK].to(stored.device)
        scores = items[start : start + _CHUNK] @ stored.T
        if exclude_self:
            own = torch.arange(len(scores), device=scores.device)
            scores[own, start + own] = -torch.inf
        order = scores.argsort(dim=1, descending=True, stable=True)
        if exclude_self:
            order = order[:, :-1]
        hits = gallery_y[order] == labels[:, None]
        hits = hits[hits.any(1)]
        ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device, dtype=torch.float64)
        average = (hits.cumsum(1) / ranks * hits).sum(1) / hits.sum(1)
        rates = hits[:, 0].double().sum(), hits[:, :5].any(1).double().sum(), average.sum()
        totals += [rate.item() for rate in rates]
        queries += len(hits)
    if not queries:
        raise ValueError("expected queries with an item of their label in the gallery, got none")
    top1, top5, precision = (totals / queries).tolist()
    return Retrieval(top1, top5, precision, queries)


def _rows(features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of numbers and labels, which may be arrays, as tensors."""
    features, y = torch.as_tensor(features), torch.as_tensor(y)
    if features.dim() < 2 or y.dim() != 1 or len(features) != len(y):
        raise ValueError(f"expected features [N, ...] and labels [N], got {tuple(features.shape)} and {tuple(y.shape)}")
    if not len(y):
        raise ValueError("expected at least one example, got none")
    rows = features.detach().flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if not rows.isfinite().all():
        raise ValueError("the features hold values that are not finite")
    return rows, y


def _check_width(train: Tensor, test: Tensor) -> None:
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"expected test features of {train.shape[1]} numbers, got {test.shape[1]}")


def _numpy(rows: Tensor) -> np.ndarray:
    return rows.cpu().numpy()
