"""Training of denoisers that are not told the noise level, and their use.

Reference:
    Kadkhodaie, Guth, Simoncelli, Mallat, arXiv 2310.02557, section 2 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from torchfolio.checks import at_least, one_of, positive, whole
from torchfolio.checks import images as check_images
from torchfolio.dynamics.blind_sampler import predicted_noise
from torchfolio.engine import Batch, FitResult, LearningRule, evaluating, fit
from torchfolio.engine.recipes import adam

__all__ = ["BlindDenoising", "denoise", "train_denoiser"]


class BlindDenoising(LearningRule):
    r"""Trains a network to predict the noise in images of all noise levels, without being told which.

    $\lVert r(x + \sigma z) - \sigma z \rVert^2$, summed over pixels, with a noise level for each image.

    Args:
        noise: way in which levels are spread over their range: `"quadratic"`, evenly in their root, as in the paper, or
            `"uniform"`.
        sigma_range: least and largest noise level, for images in [0, 1].
    """

    needs_targets = False

    def __init__(self, noise: str = "quadratic", sigma_range: tuple[float, float] = (0.0, 1.0)) -> None:
        self.power = 2 if one_of("noise", noise, ("quadratic", "uniform")) == "quadratic" else 1
        low, high = sigma_range
        if not at_least("sigma_range[0]", low, 0) < positive("sigma_range[1]", high):
            raise ValueError(f"expected rising noise levels, got {sigma_range}")
        self.sigma_range = (low, high)
        self.model: nn.Module | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        check_images(example[0], name="the batch")
        self.model = model
        return model

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        x = batch[0]
        low, high = (level ** (1 / self.power) for level in self.sigma_range)
        sigma = (low + (high - low) * torch.rand(len(x), 1, 1, 1, dtype=x.dtype, device=x.device)) ** self.power
        noise = sigma * torch.randn_like(x)
        loss = (predicted_noise(self.model, x + noise) - noise).square().flatten(1).sum(1).mean()
        backward(loss)
        return {"loss": loss.detach()}


def train_denoiser(
    model: nn.Module,
    images: Tensor,
    steps: int,
    *,
    noise: str = "quadratic",
    sigma_range: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    **arguments: Any,
) -> FitResult:
    """Train a blind denoiser in place by Adam, whose rate falls to zero over the second half.

    Few images are repeated to fill the batches, so that the steps do not depend on their number: else a denoiser of
    few images would look untrained and not memorising.

    Args:
        model: network from noisy images to their noise.
        images: clean images in [0, 1], `[N, C, H, W]`.
        steps: number of steps of the optimizer.
        noise: distribution of noise levels, see `BlindDenoising`.
        sigma_range: least and largest noise level.
        batch_size: images of a batch.
        lr: learning rate of Adam.
        seed: seed of order, noise and levels.
        **arguments: arguments of `torchfolio.engine.fit`, before which the above give way.
    """
    check_images(images, name="images", unit=True)
    repeated = images.repeat(math.ceil(whole("batch_size", batch_size, 1) / len(images)), 1, 1, 1)
    own: dict[str, Any] = {
        "rule": BlindDenoising(noise, sigma_range),
        "max_steps": steps,
        "batch_size": batch_size,
        "drop_last": True,
        "optimizer": adam(lr),
        "scheduler": _falling,
        "seed": seed,
    }
    return fit(model, (repeated, torch.zeros(len(repeated))), **{**own, **arguments})


def _falling(optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, partial(_rate, total_steps))


def _rate(total_steps: int, step: int) -> float:
    return min(1.0, 2 * (1 - step / total_steps))


@torch.no_grad()
def denoise(denoiser: nn.Module, y: Tensor, *, returns: str = "noise", batch_size: int = 256) -> Tensor:
    """Denoised images, in evaluation mode and batches.

    Args:
        denoiser: network.
        y: noisy images `[N, C, H, W]`.
        returns: whether the network returns the `"noise"` or the image, `"denoised"`.
        batch_size: images of a batch.
    """
    check_images(y, name="y")
    with evaluating(denoiser):
        return torch.cat([part - predicted_noise(denoiser, part, returns) for part in y.split(batch_size)])
