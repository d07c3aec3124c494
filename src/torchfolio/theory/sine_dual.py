"""Duals of sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchfolio.theory.dual_base import ClosedFormDual

__all__ = ["SineDual"]


class SineDual(ClosedFormDual):
    """Dual of $\\sin \\omega z$, $e^{-\\omega^2 (p + q) / 2} \\sinh \\omega^2 c$; normalised, $\\sinh a\\xi / \\sinh a$.

    Args:
        a: squared frequency $\\omega^2$, above 0.
    """

    def __init__(self, a: float = 1.0) -> None:
        if not a > 0 or not math.isfinite(a):
            raise ValueError(f"expected a above 0, got {a!r}")
        self.a = float(a)
        super().__init__(_Sine(math.sqrt(a)), a / math.tanh(a))

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        # Exponents below 0, where a hyperbolic sine would overflow; sinh keeps the digits of small covariances.
        return torch.exp(self.a * (c.abs() - (p + q) / 2)) * -torch.expm1(-2 * self.a * c.abs()) / 2 * c.sign()

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        half = (p + q) / 2
        return self.a / 2 * (torch.exp(self.a * (c - half)) + torch.exp(-self.a * (c + half)))

    def gap(self, eta: Tensor) -> Tensor:
        a = self.a
        # 2 cosh(a - aη/2) sinh(aη/2) / sinh a
        first = torch.exp(-a * eta / 2) * (1 + torch.exp(-a * (2 - eta)))
        return 2 * first * torch.sinh(a * eta / 2) / -math.expm1(-2 * a)

    def diagonal(self, q: Tensor) -> Tensor:
        return -torch.expm1(-2 * self.a * q) / 2

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return self.a / 2 * (1 + torch.exp(-2 * self.a * q))


class _Sine:
    def __init__(self, frequency: float) -> None:
        self.frequency = frequency

    def __call__(self, z: Tensor) -> Tensor:
        return torch.sin(self.frequency * z)
