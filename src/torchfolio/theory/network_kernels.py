"""Covariances of infinitely wide networks as modules whose variances can be trained."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.theory.dual_activations import Activation, dual_activation
from torchfolio.theory.dual_base import DualActivation
from torchfolio.theory.infinite_kernels import conv_nngp, conv_nngp_diagonal, nngp, nngp_diagonal

__all__ = ["ConvNNGPKernel", "NNGPKernel", "raw_of"]


def raw_of(value: float) -> nn.Parameter:
    """What softplus takes to a positive number."""
    return nn.Parameter(torch.tensor(value + math.log(-math.expm1(-value)), dtype=torch.float64))


class NNGPKernel(nn.Module):
    """Covariance of an infinitely wide fully connected network with unit last-layer variance; its variances can be
    trained.

    Args:
        depth: number of hidden layers.
        activation: name, module, function or dual; see `dual_activation`.
        weight_var: variance of weights times their fan-in, above 0; 2 keeps the scale of ReLU.
        bias_var: variance of biases, above 0.

    Shapes:
        `[n, d]`, `[m, d]` to `[n, m]`; one argument gives the symmetric kernel.
    """

    def __init__(
        self, depth: int = 4, activation: Activation = "relu", *, weight_var: float = 2.0, bias_var: float = 0.01
    ) -> None:
        super().__init__()
        self.depth = checks.whole("depth", depth, 1)
        self.dual: DualActivation = dual_activation(activation)
        self.raw_weight_var = raw_of(float(checks.positive("weight_var", weight_var)))
        self.raw_bias_var = raw_of(float(checks.positive("bias_var", bias_var)))

    @classmethod
    def of(cls, network: nn.Sequential) -> NNGPKernel:
        """The kernel of `Linear, activation, …, Linear`, with the mean variances of its weights and biases.

        Raises:
            ValueError: if the network is of another form, or its activations differ.
        """
        layers = list(network)
        linear, activations = layers[::2], layers[1::2]
        if len(layers) < 3 or len(layers) % 2 == 0 or not all(isinstance(m, nn.Linear) for m in linear):
            raise ValueError(f"expected Linear, activation, …, Linear, got {[type(m).__name__ for m in layers]}")
        if len({repr(m) for m in activations}) > 1:
            raise ValueError(f"expected one activation, got {sorted({repr(m) for m in activations})}")
        hidden: list[Any] = linear[:-1]
        weight_var = float(np.mean([m.weight.detach().square().mean().item() * m.in_features for m in hidden]))
        biases = [m.bias.detach().square().mean().item() for m in hidden if m.bias is not None]
        bias_var = max(float(np.mean(biases)) if biases else 0.0, 1e-12)
        return cls(len(activations), activations[0], weight_var=weight_var, bias_var=bias_var)

    @property
    def variances(self) -> tuple[Tensor, Tensor]:
        """Variances of weights and of biases."""
        return F.softplus(self.raw_weight_var), F.softplus(self.raw_bias_var)

    def forward(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        weight, bias = self.variances
        return nngp(x1, x2, self.dual, self.depth, weight_var=weight, bias_var=bias)

    def diagonal(self, x: Tensor) -> Tensor:
        """Variances `[n]`."""
        weight, bias = self.variances
        return nngp_diagonal(x, self.dual, self.depth, weight_var=weight, bias_var=bias)

    def extra_repr(self) -> str:
        weight, bias = self.variances
        return f"depth={self.depth}, {self.dual!r}, weight_var={weight.item():.4g}, bias_var={bias.item():.4g}"


class ConvNNGPKernel(NNGPKernel):
    """Covariance of a convolutional network (3 × 3, same size, flattened readout) of infinitely many channels.

    Args:
        image_shape: `(channels, height, width)`, into which rows are shaped.
        depth: number of hidden layers.
        activation: name, module, function or dual.
        weight_var: variance of weights times their fan-in, above 0.
        bias_var: variance of biases, above 0.

    Shapes:
        `[n, d]` or `[n, channels, height, width]`, likewise `[m, …]`, to `[n, m]`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        depth: int = 4,
        activation: Activation = "relu",
        *,
        weight_var: float = 2.0,
        bias_var: float = 0.01,
    ) -> None:
        super().__init__(depth, activation, weight_var=weight_var, bias_var=bias_var)
        self.image_shape = tuple(image_shape)

    def forward(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        weight, bias = self.variances
        first = x1.reshape(-1, *self.image_shape)
        second = None if x2 is None else x2.reshape(-1, *self.image_shape)
        return conv_nngp(first, second, self.dual, self.depth, weight_var=weight, bias_var=bias)

    def diagonal(self, x: Tensor) -> Tensor:
        weight, bias = self.variances
        images = x.reshape(-1, *self.image_shape)
        return conv_nngp_diagonal(images, self.dual, self.depth, weight_var=weight, bias_var=bias)
