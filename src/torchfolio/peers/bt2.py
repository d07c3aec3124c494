"""Retrieval of 2,000 queries in 10,000 items against a loop with scikit-learn's average precision."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torchfolio.adaptation.bt2 import upgrade_report
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    query, gallery = (F.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (2000, 10_000))
    y, stored = (torch.randint(10, (n,), generator=generator) for n in (2000, 10_000))

    def loop() -> None:
        scores = (query @ gallery.T).numpy()
        for row, label in zip(scores, y, strict=True):
            average_precision_score((stored == label).numpy(), row)

    bench.compare(
        "all pairs of queries and gallery, 2,000 x 10,000",
        repeats=3,
        ours=lambda: upgrade_report({"new": query}, y, {"old": gallery}, stored),
        scikit_learn=loop,
    )
