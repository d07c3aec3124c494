"""Surrogate derivatives of the spike test.

A neuron fires when its membrane potential reaches the threshold, $s = \\Theta(x)$ with $x = u - V_{th}$ and
$\\Theta(0) = 1$. The step has no useful derivative, so the backward pass takes another one, $\\sigma'(x)$. At the
defaults none exceeds 1 except `Sigmoid` and `ATan` at their peak, which equals 1.

Neftci, Mostafa, Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", IEEE Signal Processing Magazine 2019.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from torchfolio.checks import positive
from torchfolio.shown import Shown

__all__ = ["ATan", "Rectangle", "Sigmoid", "Surrogate", "Triangle"]


class Surrogate(Shown, ABC):
    """A spike function: forward $\\Theta(x)$ exactly, backward $\\sigma'(x)$.

    Calling it on $x = u - V_{th}$ of any shape gives spikes 0 and 1 in the dtype of `x`. Subclasses say what
    $\\sigma'$ is, and may keep less than `x` for the backward pass.
    """

    def __call__(self, x: Tensor) -> Tensor:
        return _Spike.apply(x, self)  # pyright: ignore[reportReturnType]

    def derivative(self, x: Tensor) -> Tensor:
        """$\\sigma'(x)$, elementwise."""
        return self.slope(self.keep(x), x.dtype)

    def keep(self, x: Tensor) -> Tensor:
        """What the backward pass needs of `x`."""
        return x

    @abstractmethod
    def slope(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """$\\sigma'$ in `dtype`, from what was kept."""


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.surrogate = inputs
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(ctx.surrogate.keep(x))

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,), (v,) = gradients, ctx.saved_tensors
        return gradient * ctx.surrogate.slope(v, gradient.dtype), None


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """$\\sigma'(x) = 1/w$ for $|x| \\le w/2$, else 0. Keeps a mask of one byte an element.

    Args:
        width: $w > 0$.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        positive("width", self.width)

    def keep(self, x: Tensor) -> Tensor:
        return x.abs() <= self.width / 2

    def slope(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        return kept.to(dtype) / self.width


@dataclass(frozen=True)
class Triangle(Surrogate):
    """$\\sigma'(x) = \\max(0, \\alpha - \\alpha^2 |x|)$.

    Args:
        alpha: height, and one over half the width.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def slope(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.alpha - self.alpha**2 * kept.to(dtype).abs()).clamp_min(0)


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """$\\sigma'(x) = \\alpha p (1 - p)$ with $p = 1 / (1 + e^{-\\alpha x})$.

    Args:
        alpha: four times the height.
    """

    alpha: float = 4.0

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def slope(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        p = torch.sigmoid(self.alpha * kept.to(dtype))
        return self.alpha * p * (1 - p)


@dataclass(frozen=True)
class ATan(Surrogate):
    """$\\sigma'(x) = (\\alpha / 2) / (1 + (\\pi \\alpha x / 2)^2)$.

    Args:
        alpha: twice the height.
    """

    alpha: float = 2.0

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def slope(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        return self.alpha / 2 / (1 + (math.pi * self.alpha / 2 * kept.to(dtype)) ** 2)
