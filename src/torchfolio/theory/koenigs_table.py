"""The Koenigs function of a dual activation from a table, for many pairs of points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchfolio.shown import Shown
from torchfolio.theory.dual_base import DualActivation

__all__ = ["KoenigsTable"]


class KoenigsTable(Shown):
    """The Koenigs function of $1 - \\xi$ in [0, 2], by a cubic in every 256th of an octave.

    An entry is found by the leading bits of the number itself. Errors are below 1e-8, relative where values are above 1.

    Args:
        dual: dual activation with $A = 0 \\ne A'$.
    """

    BITS, LOWEST, HIGHEST = 8, -112, 1  # a float64 difference of points of norm 1 is at least 2^-53

    def __init__(self, dual: DualActivation) -> None:
        self._dual = dual
        bins = (self.HIGHEST - self.LOWEST) << self.BITS
        self._shift = 52 - self.BITS
        self._first = (1023 + self.LOWEST) << self.BITS
        start = ((torch.arange(bins) + self._first) << self._shift).view(torch.float64)
        width = torch.cat([start[1:], start.new_tensor([2.0])]) - start
        nodes = (1 - torch.cos(math.pi * (torch.arange(4, dtype=torch.float64) + 0.5) / 4)) / 2
        values = dual.koenigs(eta=start[:, None] + width[:, None] * nodes)
        self._cubics = torch.linalg.solve(nodes[:, None] ** torch.arange(4), values.T).contiguous()
        self.is_finite = bool(torch.isfinite(self._cubics).all())

    def __call__(self, eta: Tensor) -> Tensor:
        bits = eta.contiguous().view(torch.int64)
        entry = (bits >> self._shift).sub_(self._first).clamp_(0, self._cubics.shape[1] - 1)
        within = (bits & ((1 << self._shift) - 1)).double().mul_(2.0**-self._shift)
        value = self._cubics[3][entry]
        for k in (2, 1, 0):
            value.mul_(within).add_(self._cubics[k][entry])
        opposite = eta > 1.5  # there, too, it may be singular
        if bool(opposite.any()):
            value[opposite] = self._dual.koenigs(eta=eta[opposite])
        return value.masked_fill_(eta < 2.0**self.LOWEST, math.inf)
