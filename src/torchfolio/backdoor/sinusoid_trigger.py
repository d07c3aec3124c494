"""Stripes (Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.backdoor.trigger_base import Trigger, check_unit

__all__ = ["SinusoidTrigger"]


class SinusoidTrigger(Trigger):
    """Vertical stripes, $x'_{\\cdot ij} = x_{\\cdot ij} + \\delta \\sin(2 \\pi j f / W)$; by tradition on images whose label is kept.

    Args:
        delta: amplitude $\\delta$ in [0, 1].
        freq: stripes $f$ over the width.
    """

    def __init__(self, delta: float = 40 / 255, freq: float = 6.0) -> None:
        super().__init__()
        check_unit("delta", torch.tensor(delta))
        self.delta, self.freq = delta, checks.finite("freq", checks.number("freq", freq))

    def change(self, x: Tensor, index: Tensor) -> Tensor:
        j = torch.arange(x.shape[3], device=x.device, dtype=x.dtype)
        return x + self.delta * (2 * math.pi * self.freq / x.shape[3] * j).sin()

    def settings(self) -> dict[str, Any]:
        return {"delta": self.delta, "freq": self.freq}
