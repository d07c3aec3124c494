"""What the Jacobian of a denoiser tells: its squared error without a clean image, and the basis in which it shrinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.dynamics.denoiser_jacobian import harmonic_basis, sure
from torchfolio.dynamics.harmonic_denoising import denoise


def error_of_sure(net: nn.Module, test: Tensor, sigma: float, draws: int, seed: int) -> float:
    """Relative error of SURE averaged over images and draws of the noise, whose own spread exceeds the error of one."""
    generator = torch.Generator().manual_seed(seed)
    estimate, true = 0.0, 0.0
    for draw in range(draws):
        y = test + sigma * torch.randn(test.shape, generator=generator)
        estimate += float(sure(net, y, sigma, probes=4, seed=seed + draw).mean())
        true += float((denoise(net, y) - test).square().flatten(1).sum(1).mean())
    return abs(estimate / true - 1)


def shrinkage(net: nn.Module, x: Tensor, noise: Tensor, sigmas: tuple[float, ...]) -> dict[str, Any]:
    """The basis in which one noisy image is shrunk at the middle level, and what the trace foretells at every one."""
    bases = {sigma: harmonic_basis(net, x + sigma * noise) for sigma in sigmas}
    errors = {sigma: float((basis.denoised - x).square().sum()) for sigma, basis in bases.items()}
    traces = {f"trace_{100 * sigma:.0f}": sigma**2 * basis.trace / errors[sigma] for sigma, basis in bases.items()}
    basis = bases[sigmas[1]]
    factors = basis.eigenvalues
    inside = (factors >= -0.1) & (factors <= 1.1)
    return traces | {
        "mass": factors[inside].abs().sum() / factors.abs().sum(),
        "asymmetry": basis.asymmetry,
        "dimension": basis.trace / factors.numel(),
        "oracle_over_mse": basis.oracle_shrinkage(x, sigmas[1])[1] / errors[sigmas[1]],
        "eigenvalues": factors,
        "eigenvectors": basis.eigenvectors[:16],
    }
