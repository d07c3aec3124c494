"""Digits 0 and 3 against 1 and 2: how hidden layers align with images and with the two classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.engine import Backprop, fit
from torchfolio.engine.recipes import sgd
from torchfolio.insight.representation_geometry import ShallowNetwork, condition_means, kernel_alignment
from torchfolio.runs import Run


def digits(run: Run[Any]) -> dict[str, float]:
    """Digits 0 to 3, 0 and 3 against 1 and 2: alignments of class means of the test split, and accuracies."""
    data = run.data("digits", normalize=False)

    def part(split: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = split.tensors
        kept = y < 4
        return x[kept].flatten(1), ((y[kept] == 0) | (y[kept] == 3)).float()[:, None], y[kept]

    (x, y, _), (x_test, y_test, c) = part(data.train), part(data.test)
    # Every pixel by its own constants, as the toy inputs are centred: otherwise the mean image is all that kernels see.
    mean, std = x.mean(0), x.std(0).clamp_min(0.05)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    found = {}
    budget = {"epochs": run.settings.epochs, "batch_size": 20, "seed": run.seed, "device": "cpu"}
    for kind in ("tanh", "relu"):
        generator = run.generator()
        net = ShallowNetwork(x.shape[1], run.settings.width, activation=kind, generator=generator)
        rule = Backprop(F.binary_cross_entropy_with_logits)
        fit(net, (x, y), rule=rule, optimizer=sgd(0.1, momentum=0.0), **budget)
        with torch.no_grad():
            means, inputs = condition_means(net.hidden(x_test), c), condition_means(x_test, c)
            found[f"{kind}_accuracy"] = float(((net(x_test) > 0) == (y_test > 0.5)).double().mean())
        sign = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]], dtype=torch.float64)
        K_z = means @ means.T
        found[f"{kind}_in"] = kernel_alignment(K_z, inputs @ inputs.T)
        found[f"{kind}_out"] = kernel_alignment(K_z, sign @ sign.T)
    return found
