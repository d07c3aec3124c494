"""Dual of the error function (Williams, NeurIPS 1996)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchfolio.theory.dual_base import ClosedFormDual

__all__ = ["ErfDual"]


class ErfDual(ClosedFormDual):
    """Dual of the error function, $\\frac2\\pi \\arcsin \\frac{2c}{\\sqrt{(1 + 2p)(1 + 2q)}}$."""

    def __init__(self) -> None:
        super().__init__(torch.erf, 2 / math.sqrt(5) / math.asin(2 / 3))

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(2 * c / ((1 + 2 * p) * (1 + 2 * q)).sqrt())

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return 4 / math.pi / (1 + 2 * (p + q) + 4 * (p * q - c * c).clamp_min(0)).sqrt()

    def gap(self, eta: Tensor) -> Tensor:
        # arcsin a - arcsin b = arcsin((a² - b²) / (a √(1 - b²) + b √(1 - a²))) with a = 2/3, b = a (1 - η)
        a, b = 2 / 3, 2 / 3 * (1 - eta)
        difference = a * a * eta * (2 - eta) / (a * (1 - b * b).sqrt() + b * math.sqrt(1 - a * a))
        return torch.asin(difference) / math.asin(a)

    def diagonal(self, q: Tensor) -> Tensor:
        return 2 / math.pi * torch.asin(2 * q / (1 + 2 * q))

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return 4 / math.pi / (1 + 4 * q).sqrt()
