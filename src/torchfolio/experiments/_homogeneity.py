"""Homogeneity of denoisers, and networks that lack it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.dynamics.bias_free import BiasFreeBatchNorm2d, homogeneity
from torchfolio.dynamics.denoiser_jacobian import jacobian
from torchfolio.dynamics.harmonic_denoising import denoise
from torchfolio.models import replace_layers


def ordinary(net: nn.Module, seed: int) -> nn.Module:
    """The same network with biases, drawn by the seed, and ordinary batch norms."""
    draws = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.bias = nn.Parameter(0.02 * torch.randn(module.out_channels, generator=draws))
    return replace_layers(net, BiasFreeBatchNorm2d, lambda m: nn.BatchNorm2d(m.get_parameter("weight").numel()))


def errors_of_homogeneity(net: nn.Module, y: Tensor) -> dict[str, float]:
    """Relative errors of f(ay) = a f(y) and of J(y) y = f(y)."""
    scaled = [homogeneity(net, y, factor) for factor in (0.1, 3.0)]
    denoised = denoise(net, y[:1])[0].flatten()
    product = jacobian(net, y[0]) @ y[0].flatten()
    return {"scaling": max(scaled), "jacobian": float((product - denoised).norm() / denoised.norm())}
