"""Learning filters and encoding images by scikit-learn on unfolded patches, beside ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from torchfolio.layers.filter_design import METHODS, FilterLearner
from torchfolio.runs.bench import Bench

__all__ = ["peers"]


def peers(bench: Bench) -> None:
    """Learning and encoding beside scikit-learn on unfolded patches, with equal filters."""
    from sklearn import cluster, decomposition

    kmeans: Any = cluster.MiniBatchKMeans  # its hints take n_init for text
    dictionary: Any = decomposition.MiniBatchDictionaryLearning

    X = torch.rand(500, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    learner = FilterLearner("kmeans", 24, 5, n_patches=20_000, random_state=0).fit(X)
    whitening: Any = learner.bank_.whitening
    model = kmeans(24, n_init=1, random_state=0)

    def unfolded() -> np.ndarray:
        return whitening(F.unfold(X, 5).mT.reshape(-1, 75)).numpy()

    def pooled(codes: np.ndarray) -> np.ndarray:
        return np.stack([codes[:, i : i + 6, j : j + 6].mean((1, 2)) for i in (0, 6) for j in (0, 6)], 1)

    model.fit(unfolded()[:20_000])

    def encoded() -> np.ndarray:
        distances = model.transform(unfolded())
        return pooled(np.maximum(distances.mean(1, keepdims=True) - distances, 0).reshape(500, 12, 12, 24))

    D = learner.filters_.reshape(24, -1).T

    def split() -> np.ndarray:
        s = (unfolded() @ D).reshape(500, 12, 12, 24)
        return pooled(np.concatenate([np.maximum(s - 0.25, 0), np.maximum(-s - 0.25, 0)], -1))

    triangle = FilterLearner("kmeans", 24, 5, encoder="triangle", random_state=0).fit(X)
    bench.compare("encode 500 images, 24 filters, split", ours=lambda: learner.transform(X), unfolded=split)
    bench.compare("encode 500 images, 24 filters, triangle", ours=lambda: triangle.transform(X), sklearn=encoded)
    sample = unfolded()[:20_000]
    rows, seeded = torch.from_numpy(sample), torch.Generator().manual_seed(0)
    for name, peer in {
        "kmeans": lambda: kmeans(24, n_init=1, random_state=0).fit(sample),
        "ica": lambda: decomposition.FastICA(24, random_state=0, max_iter=50, tol=1e-3).fit(sample),
        "sparse_coding": lambda: dictionary(24, alpha=1.0, max_iter=3, batch_size=500, random_state=0).fit(sample),
    }.items():  # fmt: skip
        ours = METHODS[name]()
        bench.compare(f"learn 24 filters by {name} from 20,000 patches", repeats=3,
                      ours=lambda ours=ours: ours.learn(rows, 24, seeded), sklearn=peer)  # fmt: skip
