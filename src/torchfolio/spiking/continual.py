"""Scores of learning tasks one after another, from the matrix of accuracies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchfolio.checks import finite

__all__ = ["continual_metrics"]


def continual_metrics(accuracies: Any) -> dict[str, float]:
    """Scores of learning K tasks one after another.

    With $a_{kj}$ the accuracy on task j after task k, the mean of the last row, the backward transfer $\\mathrm{mean}_{j
    < K-1}(a_{K-1,j} - a_{jj})$, and the forgetting $\\mathrm{mean}_{j<K-1}(\\max_{k<K-1} a_{kj} - a_{K-1,j})$.

    Args:
        accuracies: matrix `[K, K]`; entries above the diagonal are not read, and may be NaN.

    Returns:
        `acc`, `bwt`, `forgetting`, in the unit of the matrix; the last two are 0 for one task.

    Raises:
        ValueError: if it is not square, or an entry that is read is NaN.
    """
    matrix = torch.as_tensor(accuracies).detach().cpu().double().numpy()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"expected accuracies [K, K], got shape {matrix.shape}")
    tasks = len(matrix)
    finite("accuracies on and below the diagonal", matrix[np.tril_indices(tasks)])
    if tasks == 1:
        return {"acc": float(matrix[0, 0]), "bwt": 0.0, "forgetting": 0.0}
    last, learned = matrix[-1, :-1], matrix.diagonal()[:-1]
    best = np.array([matrix[j:-1, j].max() for j in range(tasks - 1)])
    return {
        "acc": float(matrix[-1].mean()),
        "bwt": float((last - learned).mean()),
        "forgetting": float((best - last).mean()),
    }
