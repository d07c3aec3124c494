"""Correlating and matching two layers, beside NumPy's correlations and SciPy's assignment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from torchfolio.insight.convergent_learning import bipartite_match, correlation_blocks
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    a, b = torch.randn(2, 50_000, 128, generator=torch.Generator().manual_seed(0)).relu()
    first, second = a.numpy(), b.numpy()

    def numpy() -> Any:
        between = np.corrcoef(first, second, rowvar=False)[:128, 128:]
        return linear_sum_assignment(between, maximize=True)

    bench.compare("match 128 units by 50,000 samples", ours=lambda: bipartite_match(correlation_blocks(a, b).between),
                  numpy=numpy)  # fmt: skip
