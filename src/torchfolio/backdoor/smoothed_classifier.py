"""A classifier averaged over Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchfolio import checks

__all__ = ["Denoiser", "SmoothedClassifier"]

Denoiser = Callable[[Tensor, float], Tensor]


class SmoothedClassifier(nn.Module):
    """Mean of a classifier's probabilities under Gaussian noise, $g(x)$; noise is drawn anew in every call.

    Noisy inputs are not clamped. Each image gets draws of its own.

    Args:
        model: network from images in [0, 1] to logits.
        sigma: deviation $\\sigma$ of the noise; 0 is none.
        n: number $N$ of draws.
        denoiser: function (noisy images, sigma) to images, put before the network, such as
            `torchfolio.backdoor.denoising.OneStepDenoiser`.
        chunk: noisy images that go through the network at once; all by default.
        generator: source of the noise; the global one by default.

    Shapes:
        `[B, C, H, W]` to probabilities `[B, K]`.

    Raises:
        ValueError: on a negative `sigma`, or `n` or `chunk` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float,
        n: int = 40,
        denoiser: Denoiser | None = None,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.sigma, self.n = checks.at_least("sigma", sigma, 0), checks.whole("n", n, 1)
        self.chunk = None if chunk is None else checks.whole("chunk", chunk, 1)
        self.model, self.denoiser, self.generator = model, denoiser, generator

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), self.n, *x.shape[1:], device=x.device, dtype=x.dtype, generator=self.generator)
        size = max(1, self.chunk // self.n) if self.chunk else max(1, len(x))
        parts = zip(x.split(size), noise.split(size), strict=True)
        return torch.cat([self.log_probabilities(*part).exp() for part in parts])

    def log_probabilities(self, x: Tensor, noise: Tensor) -> Tensor:
        """$\\log g$ of images `[B, ...]` with given draws `[B, n, ...]`, `[B, K]`."""
        noisy = (x[:, None] + self.sigma * noise).flatten(0, 1)
        if noisy.dim() == 4:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        if self.denoiser is not None:
            noisy = self.denoiser(noisy, self.sigma)
        logs = self.model(noisy).log_softmax(1).unflatten(0, noise.shape[:2])
        return logs.logsumexp(1) - math.log(noise.shape[1])
