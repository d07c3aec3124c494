"""Evidence of a process with a deep kernel by other means: written plainly, and by GPyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchfolio.theory.infinite_kernels import nngp


def plainly(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Kernel of four ReLU layers and evidence, on whole matrices."""
    n = len(x)
    K = 2 * x @ x.T / x.shape[1] + 0.01
    for layer in range(4):
        norm = K.diagonal().sqrt()
        scale = torch.outer(norm, norm)
        theta = torch.acos((K / scale).clamp(-1, 1))
        K = scale * (torch.sin(theta) + (math.pi - theta) * torch.cos(theta)) / (2 * math.pi)
        K = 2 * K + 0.01 if layer < 3 else K
    C = K + 0.1 * torch.eye(n, dtype=x.dtype)
    factor = torch.linalg.cholesky(C)
    quadratic = y @ torch.cholesky_solve(y[:, None], factor)[:, 0]
    gammas = torch.lgamma(a + n / 2) - torch.lgamma(a) - n / 2 * torch.log(2 * math.pi * b)
    return gammas - factor.diagonal().log().sum() - (a + n / 2) * torch.log1p(quadratic / (2 * b))


def by_gpytorch(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """GPyTorch's exact process on the same kernel."""
    import gpytorch  # pyright: ignore[reportMissingImports]

    class Kernel(gpytorch.kernels.Kernel):
        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **settings: Any) -> Tensor:
            K = nngp(x1, None if torch.equal(x1, x2) else x2, "relu", 4, weight_var=2.0, bias_var=0.01)
            return K.diagonal() if diag else K

    class Process(gpytorch.models.ExactGP):
        def __init__(self, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean, self.covariance = gpytorch.means.ZeroMean(), Kernel()

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.covariance(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.1
    process = Process(likelihood).train()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, process)

    def call() -> Tensor:
        with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
            return evidence(process(x), y)

    return call
