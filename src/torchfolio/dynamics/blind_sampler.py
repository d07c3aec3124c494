r"""Drawing images with a denoiser that is told no noise level, under linear measurements too.

Reference:
    Kadkhodaie, Simoncelli, "Stochastic Solutions for Linear Inverse Problems Using the Prior Implicit in a Denoiser",
    NeurIPS 2021, algorithms 1 and 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.checks import between, one_of, positive, whole
from torchfolio.engine import evaluating
from torchfolio.shown import Shown

__all__ = ["Drawn", "Measurement", "draw_images", "predicted_noise"]

RETURNS = ("noise", "denoised")
DIVERGED = 2.0  # a noise level that no image in [0, 1] has


@dataclass(frozen=True, repr=False)
class Measurement(Shown):
    r"""What is known of an image, $M^\top x$ for a matrix M with orthonormal columns.

    Attributes:
        project: $x \mapsto M M^\top x$ on batches of images; a mask, for inpainting.
        target: $M M^\top x$ of the image that was measured, `[C, H, W]` or one for each image drawn.
    """

    project: Callable[[Tensor], Tensor]
    target: Tensor


@dataclass(frozen=True, repr=False)
class Drawn(Shown):
    """What `draw_images` gives.

    Attributes:
        images: `[n, C, H, W]`.
        sigmas: noise level of each image at each step `[steps, n]`, NaN after it stopped.
        steps: steps of each image `[n]`.
        converged: whether it came down to the last noise level `[n]`.
    """

    images: Tensor
    sigmas: Tensor
    steps: Tensor
    converged: Tensor


def predicted_noise(denoiser: Callable[[Tensor], Tensor], y: Tensor, returns: str = "noise") -> Tensor:
    """The noise that a denoiser sees in y, whether it returns that or the denoised image."""
    output = denoiser(y)
    if output.shape != y.shape:
        raise ValueError(f"expected the denoiser's output of shape {tuple(y.shape)}, got {tuple(output.shape)}")
    return output if one_of("returns", returns, RETURNS) == "noise" else y - output


@torch.no_grad()
def draw_images(
    denoiser: nn.Module,
    shape: Sequence[int],
    n: int = 1,
    *,
    h0: float = 0.01,
    beta: float = 0.01,
    sigma_start: float = 1.0,
    sigma_end: float = 0.01,
    mean: float = 0.0,
    measurement: Measurement | None = None,
    max_steps: int = 2000,
    returns: str = "noise",
    generator: torch.Generator | None = None,
) -> Drawn:
    r"""Climb from noise to images, coarse to fine, each image with a step size of its own noise level.

    With $d = r(y)$ and $\sigma = \lVert d \rVert / \sqrt{\dim}$ of each image, and $h = h_0 t / (1 + h_0 (t - 1))$,

    $$ y \leftarrow y - h d + \gamma z, \qquad \gamma^2 = \sigma^2 \big((1 - \beta h)^2 - (1 - h)^2\big), $$

    until $\sigma \le \sigma_L$; then $y - r(y)$. Under a measurement
    $d = r - M M^\top r + (M M^\top y - M M^\top x)$. Images that are done leave the batch.

    Args:
        denoiser: blind denoiser, run in evaluation mode.
        shape: shape of an image `(C, H, W)`.
        n: number of images.
        h0: first step size, in (0, 1].
        beta: share of the noise that is taken away permanently, in (0, 1]; 1 adds no noise.
        sigma_start: standard deviation of the first noise.
        sigma_end: noise level $\sigma_L$ at which an image is done.
        mean: mean of the first noise; the mean of the training images spares a dark beginning.
        measurement: measurement of the images, if there is any.
        max_steps: maximum number of steps.
        returns: whether the denoiser returns the `"noise"` or the image, `"denoised"`.
        generator: source of the noise, on any device; the global one by default.

    Warns:
        UserWarning: if images diverged (a noise level above 2) or did not come down to `sigma_end`.
    """
    for name, value in (("h0", h0), ("beta", beta)):
        between(name, value, 0, 1, inclusive=(False, True))
    if positive("sigma_end", sigma_end) >= positive("sigma_start", sigma_start):
        raise ValueError(f"expected sigma_end below sigma_start, got {sigma_end} and {sigma_start}")
    shape, like = tuple(shape), next(iter(denoiser.parameters()), torch.empty(0))
    source = generator.device if generator is not None else like.device

    def noise(count: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=like.dtype, device=source).to(like.device)

    y = mean + sigma_start * noise(whole("n", n, 1))
    target = None if measurement is None else measurement.target.to(y).expand_as(y)
    images, active = y.clone(), torch.arange(n, device=y.device)
    converged, steps = (torch.zeros(n, dtype=kind, device=y.device) for kind in (torch.bool, torch.long))
    sigmas = torch.full((whole("max_steps", max_steps, 1), n), float("nan"), device=y.device)
    with evaluating(denoiser):
        for t in range(1, max_steps + 1):
            residual = predicted_noise(denoiser, y, returns)
            d = residual
            if measurement is not None and target is not None:
                d = residual - measurement.project(residual) + measurement.project(y) - target[active]
            level = d.flatten(1).norm(dim=1) / d[0].numel() ** 0.5
            sigmas[t - 1, active], steps[active] = level.to(sigmas), t
            images[active] = y - residual
            done, lost = level <= sigma_end, ~(level <= DIVERGED)
            converged[active] = done
            stay = ~(done | lost)
            if not bool(stay.any()):
                break
            active, y, d, level = active[stay], y[stay], d[stay], level[stay]
            h = h0 * t / (1 + h0 * (t - 1))
            gamma = level * ((1 - beta * h) ** 2 - (1 - h) ** 2) ** 0.5
            y = (
                y - h * d + gamma[:, None, None, None] * noise(n)[active]
            )  # all draw, so that none hangs on when another stops
    if not bool(converged.all()):
        warnings.warn(
            f"{int((~converged).sum())} of {n} images diverged or did not come down to {sigma_end}", stacklevel=2
        )
    return Drawn(images, sigmas[: int(steps.max())], steps, converged)
