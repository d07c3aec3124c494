"""A diffusion model as a denoiser of images in one step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio import checks

__all__ = ["OneStepDenoiser"]


class OneStepDenoiser(nn.Module):
    """The image that an unconditional diffusion model sees in a noisy one, by a single step.

    Diffusion works on $[-1, 1]$, so that noise of deviation $\\sigma$ on an image in $[0, 1]$ has $2 \\sigma$ there. The
    step is the first $t$ with $\\sqrt{1 - \\bar\\alpha_t} / \\sqrt{\\bar\\alpha_t} \\ge 2 \\sigma$, and with the predicted
    noise $\\hat\\epsilon$ of $z = \\sqrt{\\bar\\alpha_t} (2 x - 1)$ the image is

    $$D(x) = \\tfrac12 \\left( \\frac{z - \\sqrt{1 - \\bar\\alpha_t}\\, \\hat\\epsilon(z, t)}{\\sqrt{\\bar\\alpha_t}} + 1 \\right).$$

    Gradients flow through it.

    Args:
        unet: network from (z, t) to the noise, or to an object whose `sample` it is, such as `diffusers`' `UNet2DModel`.
        alphas_cumprod: $\\bar\\alpha$ of every step, falling `[T]`; by default of 1,000 steps whose noise grows
            linearly from 1e-4 to 0.02, as in `diffusers`' `DDPMScheduler`.

    Shapes:
        `[N, C, H, W]` to the same.

    Raises:
        ValueError: if `alphas_cumprod` does not fall within (0, 1), or $\\sigma$ is above what it reaches.

    Reference:
        Carlini et al., "(Certified!!) Adversarial Robustness for Free!", ICLR 2023, Algorithm 1.
    """

    alphas_cumprod: Tensor

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor | None = None) -> None:
        super().__init__()
        if alphas_cumprod is None:
            alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        checks.finite("alphas_cumprod", alphas_cumprod)
        a = alphas_cumprod.detach().double()
        if a.dim() != 1 or not len(a) or not bool(((a > 0) & (a < 1)).all()) or bool((a.diff() > 0).any()):
            raise ValueError(f"expected alphas_cumprod [T] that fall within (0, 1), got shape {tuple(a.shape)}")
        self.unet = unet
        self.register_buffer("alphas_cumprod", a)

    def step(self, sigma: float) -> int:
        """The step whose noise is that of an image with deviation `sigma`."""
        ratio = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        enough = (ratio >= 2 * checks.at_least("sigma", sigma, 0)).nonzero()
        if not len(enough):
            raise ValueError(f"expected sigma up to {float(ratio.max()) / 2:.3g}, the schedule's, got {sigma}")
        return int(enough[0])

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        t = self.step(sigma)
        alpha = float(self.alphas_cumprod[t])
        z = alpha**0.5 * (2 * x - 1)
        output = self.unet(z, torch.full((len(x),), t, device=x.device))
        noise = getattr(output, "sample", output)
        return ((z - (1 - alpha) ** 0.5 * noise) / alpha**0.5 + 1) / 2
