"""Bundled networks whose last matrix is solved for, beside Adam on the same matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.layers.snnk import BundledClassifier

__all__ = ["against_adam"]


def against_adam(data: DataSplits, widths: tuple[int, ...], features: Any = "relu", *, seed: int) -> dict[str, float]:
    """A bundled classifier's accuracy in percent and loss, and the lowest loss that Adam reaches from 0.

    Args:
        data: examples, flattened.
        widths: numbers of random features, layer by layer.
        features: kind of features; Adam is run for `"relu"` alone, at three rates.
        seed: random seed.
    """
    (X, y), (X_test, y_test) = ((p.tensors[0].flatten(1), p.tensors[1]) for p in (data.train, data.test))
    model = BundledClassifier(widths, features, random_state=seed).fit(X.numpy(), y.numpy())
    last: Any = model.network_[-1]
    with torch.no_grad():
        Z = F.pad(model.network_[:-1](X.double()), (0, 1), value=1.0)
        best = torch.cat([last.weight, last.bias[:, None]], 1).mT
    Y = 2 * F.one_hot(y, data.num_classes).double() - 1
    gram, cross, penalty = Z.mT @ Z, Z.mT @ Y, torch.full((Z.shape[1], 1), model.alpha).double()
    penalty[-1] = 0

    def loss(W: Tensor) -> Tensor:
        return (W * (gram @ W - 2 * cross + penalty * W)).sum() + Y.square().sum()

    lowest = math.inf
    for rate in (1e-2, 1e-1, 1.0) if features == "relu" else ():
        W = torch.zeros_like(best, requires_grad=True)
        optimizer = torch.optim.Adam([W], rate)
        for _ in range(500):
            optimizer.zero_grad()
            loss(W).backward()
            optimizer.step()
        lowest = min(lowest, loss(W).item())
    right = (model.predict(X_test.numpy()) == y_test.numpy()).mean()
    return {"accuracy": 100 * float(right), "loss": loss(best).item(), "adam": lowest}
