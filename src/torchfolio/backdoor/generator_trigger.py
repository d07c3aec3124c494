"""Triggers that a network paints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.backdoor.trigger_base import Trigger

__all__ = ["GeneratorTrigger"]


class GeneratorTrigger(Trigger):
    """A network's image within $\\varepsilon$ of the original, $x' = \\min(\\max(g(x), x - \\varepsilon), x + \\varepsilon)$.

    Args:
        net: $g$, from images to images.
        eps: $\\varepsilon$.
    """

    def __init__(self, net: nn.Module, eps: float = 8 / 255) -> None:
        super().__init__()
        self.net, self.eps = net, checks.at_least("eps", eps, 0)

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(self.net(x), x - self.eps), x + self.eps)

    def settings(self) -> dict[str, Any]:
        return {"eps": self.eps}

    @classmethod
    def _build(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
    ) -> Trigger:
        if "net" not in modules:
            raise ValueError("a GeneratorTrigger is built around a network: pass it as net=")
        trigger = cls(modules["net"], **settings)
        trigger.load_state_dict(tensors)
        return trigger
