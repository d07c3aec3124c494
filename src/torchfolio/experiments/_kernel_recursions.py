"""Kernel regression with the optimal activation on the circle as published: a recursion of depth 100, and a solve."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def recursion(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, *, tangent: bool) -> Tensor:
    """Outputs for test points by the kernel of the network's outputs, or by its tangent kernel; powers as products."""
    train, test = torch.from_numpy(X), torch.from_numpy(X_test)
    kernels = []
    for first in (train, test):
        xi = (first @ train.T).clamp_(-1, 1)
        theta = xi.clone()
        for _ in range(100):
            square = xi * xi
            sixth = square * square * square
            after = (sixth + 1).mul_(xi).div_(2)
            if tangent:
                theta = theta.mul_(sixth.mul_(3.5).add_(0.5)).add_(after)
            xi = after
        kernels.append(theta if tangent else xi)
    kernels[0].fill_diagonal_(1 if not tangent else 4.0**100)
    return kernels[1] @ torch.linalg.solve(kernels[0], torch.from_numpy(2.0 * y - 1))
