"""A network whose hidden units are in another order, for measures of similarity that should not mind."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def permuted_copy(net: nn.Sequential, generator: torch.Generator) -> tuple[nn.Sequential, list[Tensor]]:
    """The same function with the units of every hidden layer in another order, and those orders."""
    other = copy.deepcopy(net)
    weighted: list[Any] = [m for m in other.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    orders: list[Tensor] = []
    with torch.no_grad():
        for layer, following in pairwise(weighted):
            order = torch.randperm(len(layer.weight), generator=generator)
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
            # A linear layer on flattened maps has all positions of one channel side by side.
            w = following.weight
            grouped = w.view(len(w), len(order), -1)
            following.weight.copy_(grouped[:, order].reshape(w.shape))
            orders.append(order)
    return other, orders
