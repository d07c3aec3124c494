"""LoRA: a trained matrix of low rank beside every linear layer, which stays as it is.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

__all__ = ["LoRA", "with_lora"]


class LoRA(nn.Module):
    """A linear layer beside a trained low-rank one, $Wx + b + BAx$; B begins at 0."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """A network with LoRA on all linear layers but those of the time; all else is frozen."""
    net = copy.deepcopy(model).requires_grad_(False)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and name != "time":
            net.set_submodule(name, LoRA(layer, rank))
    return net
