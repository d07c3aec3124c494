"""Comparing layers of two networks: one streaming pass, against holding all activations as a notebook does.

Two layers of S channels over N maps of 14x14, in batches. The peer keeps every activation, joins them into one array,
takes `numpy.corrcoef` of it, matches with `scipy`, and fits scikit-learn's lasso once for every predicted unit.

    python benchmarks/bench_convergent_learning.py [--units 64] [--examples 200] [--rounds 5]

Measured on one thread of a small cloud CPU: statistics and matching take 1.4 times as long as with everything in memory,
for activations of one batch held in the place of all; sparse prediction from the correlations alone is 200 times as
fast (185 to 219) as the lasso on the samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import Lasso
from torch import Tensor

from torchfolio.insight.convergent_learning import (
    CorrelationBlocks,
    PairStatistics,
    bipartite_match,
    sparse_prediction,
)
from torchfolio.measure import alternate

Batches = list[tuple[Tensor, Tensor]]
ALPHA = 0.03


def batches(examples: int, units: int, size: int = 50) -> Batches:
    """Maps of two layers that share a low-dimensional code."""
    generator = torch.Generator().manual_seed(0)
    mixing = [torch.randn(units // 2, units, generator=generator) for _ in range(2)]
    found = []
    for start in range(0, examples, size):
        code = torch.randn(min(size, examples - start), 14, 14, units // 2, generator=generator)
        maps = [(code @ m + torch.randn(*code.shape[:3], units, generator=generator)).relu() for m in mixing]
        found.append((maps[0].permute(0, 3, 1, 2).contiguous(), maps[1].permute(0, 3, 1, 2).contiguous()))
    return found


def streamed(data: Batches) -> CorrelationBlocks:
    statistics = PairStatistics()
    for a, b in data:
        statistics.add(a, b)
    return statistics.finalize()


def held(data: Batches) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = (np.concatenate([pair[k].permute(0, 2, 3, 1).flatten(0, 2).numpy() for pair in data]) for k in (0, 1))
    return np.corrcoef(a, b, rowvar=False), a, b


def lasso_by_unit(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = ((t - t.mean(0)) / t.std(0) for t in (a, b))
    return np.stack([Lasso(ALPHA, tol=1e-6, max_iter=10_000).fit(a, column).coef_ for column in b.T], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    data = batches(arguments.examples, arguments.units)
    blocks = streamed(data)
    joint, a, b = held(data)
    between = joint[: arguments.units, arguments.units :]
    print("statistics and matching")
    both: dict[str, Callable[[], Any]] = {
        "streamed": lambda: bipartite_match(streamed(data).between),
        "held": lambda: linear_sum_assignment(held(data)[0][: arguments.units, arguments.units :], maximize=True),
    }
    print(alternate(**both, repeats=arguments.rounds))  # pyright: ignore[reportArgumentType]
    print("sparse prediction of every unit")
    predictions: dict[str, Callable[[], Any]] = {
        "gram": lambda: sparse_prediction(blocks, [ALPHA], validate=False),
        "by_unit": lambda: lasso_by_unit(a, b),
    }
    print(alternate(**predictions, repeats=max(1, arguments.rounds // 2)))  # pyright: ignore[reportArgumentType]
    weights = sparse_prediction(blocks, [ALPHA], validate=False).weights[0].numpy()
    print(f"largest difference of a correlation: {np.abs(between - blocks.between.numpy()).max():.1e}")
    print(f"largest difference of a weight:      {np.abs(weights - lasso_by_unit(a, b)).max():.1e}")


if __name__ == "__main__":
    main()
