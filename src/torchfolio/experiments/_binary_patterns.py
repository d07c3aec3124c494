"""The task and the networks of Shwartz-Ziv and Tishby: twelve bits, two classes, and a funnel of narrow layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.runs import Run

ACTIVATIONS: dict[str, type[nn.Module] | Any] = {
    "tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "softplus": nn.Softplus, "swish": nn.SiLU, "prelu": nn.PReLU,
}  # fmt: skip


class Net(nn.Sequential):
    """A small network of truncated normal weights, wider ones for activations other than tanh."""

    def __init__(self, widths: tuple[int, ...], activation: str) -> None:
        sizes = [12, *widths]
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for k, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
            children[f"layer{k}"] = nn.Sequential(nn.Linear(a, b), ACTIVATIONS[activation]())
        children["head"] = nn.Linear(sizes[-1], 2)
        super().__init__(children)
        scale = 1.0 if activation == "tanh" else 2.0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = scale / math.sqrt(module.in_features)
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)


def patterns(run: Run[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """All patterns, their labels, and which ones are trained on."""
    data = run.data("szt", normalize=False, val=0)
    x, y = (torch.cat([a, b]) for a, b in zip(data.train.tensors, data.test.tensors, strict=True))
    chosen = torch.randperm(len(x), generator=run.generator())
    mask = torch.zeros(len(x), dtype=torch.bool)
    mask[chosen[: round(run.settings.train_share * len(x))]] = True
    return x, y, mask


def hidden_weights(penalty: float) -> Callable[[dict[str, Tensor]], Tensor]:
    """Half the squared weights of every network's layers but the last, times the penalty, `[members]`."""

    def of(stacked: dict[str, Tensor]) -> Tensor:
        weights = [w.flatten(1) for name, w in stacked.items() if w.dim() == 3 and not name.startswith("head")]
        return 0.5 * penalty * torch.cat(weights, dim=1).square().sum(1)

    return of
