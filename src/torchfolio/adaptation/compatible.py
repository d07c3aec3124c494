"""Embeddings that stay comparable with those of an earlier model: the parts that methods share.

`class_prototypes` and `BCTLoss` (backward-compatible training, which the other methods build on), reports on all pairs of
queries and galleries, and on galleries that are replaced in part.

Reference:
    Shen et al., Towards Backward-Compatible Representation Learning, CVPR 2020.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import between, finite, labels, same_length
from torchfolio.measure import retrieval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BCTLoss", "backfill_curve", "class_prototypes", "normalized", "upgrade_report"]


def normalized(embeddings: Tensor, name: str = "embeddings") -> Tensor:
    """Embeddings of unit length; says so where they were not."""
    lengths = finite(name, embeddings).norm(dim=-1, keepdim=True)
    if bool(((lengths - 1).abs() > 1e-3).any()):
        warnings.warn(f"{name} are not of unit length and are normalised", stacklevel=3)
    return embeddings / lengths.clamp_min(1e-12)


def class_prototypes(embeddings: Tensor, y: Tensor, num_classes: int | None = None) -> Tensor:
    """Means of a model's embeddings by class, `[K, m]`: a classifier that the model never trained. Not normalised.

    Args:
        embeddings: embeddings of the old model on the new training data, `[N, m]`, of unit length.
        y: labels `[N]`.
        num_classes: K; as many as there are labels by default.

    Raises:
        ValueError: if a class has no example.
    """
    same_length(embeddings=embeddings, y=y)
    count = int(y.max()) + 1 if num_classes is None else num_classes
    labels(y, count)
    sizes = torch.bincount(y, minlength=count)
    if bool((sizes == 0).any()):
        raise ValueError(
            f"expected examples of all {count} classes, got none of class {int((sizes == 0).nonzero()[0])}"
        )
    sums = torch.zeros(count, embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    return sums.index_add_(0, y, embeddings) / sizes.to(embeddings)[:, None]


class BCTLoss(nn.Module):
    """Cross-entropy, and cross-entropy by the old model's prototypes on the first coordinates.

    $$\\mathrm{CE}(Af, t) + \\alpha\\, \\mathrm{CE}(f_{1..m} W^\\top, t)$$

    Args:
        prototypes: $W$ `[K, m]`, see `class_prototypes`.
        alpha: $\\alpha \\ge 0$.

    Shapes:
        logits `[B, K]`, embedding `[B, >= m]`, labels `[B]`, to a scalar.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, alpha: float = 10.0) -> None:
        super().__init__()
        self.alpha = between("alpha", alpha, 0, math.inf, inclusive=(True, False))
        self.register_buffer("prototypes", finite("prototypes", prototypes).detach().clone())

    def forward(self, logits: Tensor, embedding: Tensor, y: Tensor) -> Tensor:
        if embedding.shape[1] < self.prototypes.shape[1]:
            raise ValueError(
                f"expected embeddings of at least {self.prototypes.shape[1]} coordinates, got {embedding.shape[1]}"
            )
        old = embedding[:, : self.prototypes.shape[1]] @ self.prototypes.T
        return F.cross_entropy(logits, y) + self.alpha * F.cross_entropy(old, y)


def upgrade_report(
    queries: Mapping[str, Tensor],
    y: Tensor,
    galleries: Mapping[str, Tensor] | None = None,
    gallery_y: Tensor | None = None,
    *,
    truncate: bool = False,
) -> pd.DataFrame:
    """Retrieval of every model's queries in every model's gallery: what an update does to a service.

    Args:
        queries: embeddings `[N, dim]` by the name of the model.
        y: labels `[N]`.
        galleries: embeddings by name; the queries themselves by default, each without itself.
        gallery_y: their labels.
        truncate: whether embeddings of unequal length are compared by their first coordinates, as compatible ones are.

    Returns:
        Columns `query`, `gallery`, `top1`, `top5`, `mean_average_precision`, a row for each pair.

    Raises:
        ValueError: if lengths differ and `truncate` is False, or galleries come without labels.
    """
    import pandas as pd

    own = galleries is None
    stored = queries if galleries is None else galleries
    if not own and gallery_y is None:
        raise ValueError("expected gallery_y, the labels of the galleries, got None")
    rows = []
    for name, query in queries.items():
        for other, gallery in stored.items():
            if query.shape[1] != gallery.shape[1] and not truncate:
                raise ValueError(
                    f"{name} has {query.shape[1]} coordinates and {other} {gallery.shape[1]}; pass truncate=True to "
                    "compare the first ones"
                )
            scores = retrieval(query, y, gallery, y if gallery_y is None else gallery_y, exclude_self=own)
            rows.append({"query": name, "gallery": other, "top1": scores.top1, "top5": scores.top5,
                         "mean_average_precision": scores.mean_average_precision})  # fmt: skip
    return pd.DataFrame(rows)


def backfill_curve(
    query: Tensor, y: Tensor, old: Tensor, new: Tensor, gallery_y: Tensor, fractions: Sequence[float], *, seed: int = 0
) -> list[float]:
    """Mean average precision while a gallery is replaced bit by bit; mixed galleries compare the old coordinates.

    Args:
        query: new embeddings `[Q, n]`.
        y: their labels.
        old: old embeddings of the gallery `[G, m]`.
        new: new embeddings of the gallery `[G, n]`.
        gallery_y: labels `[G]`.
        fractions: shares that have been replaced, in [0, 1]; at 1 all coordinates are compared.
        seed: seed of the order of replacement.
    """
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))
    scores = []
    for fraction in fractions:
        between("fraction", fraction, 0, 1)
        mixed = old.clone()
        replaced = order[: round(fraction * len(old))]
        first = new[:, : old.shape[1]]
        mixed[replaced] = (first / first.norm(dim=1, keepdim=True).clamp_min(1e-12))[replaced]
        stored = new if len(replaced) == len(old) else mixed
        scores.append(retrieval(query, y, stored, gallery_y).mean_average_precision)
    return scores
