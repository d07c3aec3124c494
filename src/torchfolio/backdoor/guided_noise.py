"""Small noise that an image-text encoder guides: erasing what it recognises, or a trigger that it takes notice of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.backdoor.additive_trigger import AdditiveTrigger
from torchfolio.backdoor.image_text import ImageTextEncoder
from torchfolio.backdoor.keyed_random import keyed_uniform
from torchfolio.checks import at_least, images, one_of, positive, whole
from torchfolio.measure import untouched

__all__ = ["agreement_loss", "clean_feature_erase", "erasing_loss", "target_loss", "universal_trigger"]

Objective = Callable[[ImageTextEncoder, Tensor], Tensor]


def erasing_loss(encoder: ImageTextEncoder, x: Tensor) -> Tensor:
    """Squared distance of the encoder's class probabilities to the uniform ones, `[N]`: the mean over classes of

    $$(h_c(x) - 1/C)^2, \\qquad h(x) = \\operatorname{softmax}_c(\\text{scale} \\cdot \\cos(E_i(x), E_t(c))).$$
    """
    return (encoder(x).softmax(1) - 1 / encoder.num_classes).square().mean(1)


def target_loss(encoder: ImageTextEncoder, x: Tensor, target: int) -> Tensor:
    """Cross-entropy of the encoder's class scores with the target, the mean over images (CLIP-UAP)."""
    return F.cross_entropy(encoder(x), torch.full((len(x),), target, device=x.device))


def agreement_loss(encoder: ImageTextEncoder, x: Tensor) -> Tensor:
    """One minus the cosine of the features of different images, the mean over pairs (CLIP-CFA).

    Image j of the first half is compared with image j of the second; the last one of an odd batch is left out.
    """
    half = len(x) // 2
    first, second = encoder.encode_image(x[: 2 * half]).split(half)
    return 1 - F.cosine_similarity(first, second).mean()


def clean_feature_erase(
    encoder: ImageTextEncoder,
    x: Tensor,
    eps: float = 8 / 255,
    steps: int = 50,
    step: float | None = None,
    *,
    index: Tensor | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Tensor:
    """Images from which the encoder can no longer tell the class: projected sign descent on `erasing_loss`.

    Each image starts at a point of its own, drawn evenly from the cube of half side `eps` around it.

    Args:
        encoder: guide, run in evaluation mode and left as it was.
        x: images `[N, C, H, W]` in [0, 1].
        eps: largest change of a pixel; 0 gives the images back.
        steps: number of descent steps.
        step: size of one; an eighth of `eps` by default, as in the paper.
        index: numbers `[N]` that the random starts belong to; 0 to N - 1 by default.
        batch_size: number of images at a time, which the outcome does not depend on but for rounding.
        seed: seed of the random starts.

    Returns:
        Images `[N, C, H, W]` in [0, 1], of which no pixel differs by more than `eps`, exactly.

    Raises:
        ValueError: on images outside [0, 1], an encoder that gives NaN, or settings out of range.

    Reference:
        Section 4.1, clean feature erasing.
    """
    images(x, unit=True)
    step = _step(eps, step, 1 / 8)
    whole("steps", steps, 0)
    index = torch.arange(len(x)) if index is None else index
    with _frozen(encoder) as device:
        parts = [
            _erase(encoder, part.to(device), eps, steps, step, number.to(device), seed).to(x.device)
            for part, number in zip(x.split(whole("batch_size", batch_size, 1)), index.split(batch_size), strict=True)
        ]
    return torch.cat(parts)


def _erase(
    encoder: ImageTextEncoder, x: Tensor, eps: float, steps: int, step: float, index: Tensor, seed: int
) -> Tensor:
    low, high = _ball(x, eps)
    start = 2 * keyed_uniform(seed, index, x.shape[1:]).to(x) - 1
    y = (x + eps * start).clamp(low, high)
    for _ in range(steps):
        y.requires_grad_(True)
        (gradient,) = torch.autograd.grad(_finite(erasing_loss(encoder, y).sum()), y)
        y = (y.detach() - step * gradient.sign()).clamp(low, high)
    return y


def universal_trigger(
    encoder: ImageTextEncoder,
    x: Tensor,
    objective: Literal["uap", "cfa"] | Objective = "cfa",
    *,
    target: int | None = None,
    eps: float = 8 / 255,
    epochs: int = 300,
    batch_size: int = 100,
    step: float | None = None,
    seed: int = 0,
) -> AdditiveTrigger:
    """One small pattern $\\delta$ for all images, by sign descent over images that the attacker holds.

    $$\\delta \\leftarrow \\operatorname{clamp}(\\delta - a \\operatorname{sign} \\nabla_\\delta
    \\ell(\\operatorname{clamp}(x + \\delta, 0, 1)), -\\varepsilon, \\varepsilon)$$

    Args:
        encoder: guide, run in evaluation mode and left as it was.
        x: images `[N, C, H, W]` in [0, 1], two or more.
        objective: `"uap"` makes images look like the target class (`target_loss`), `"cfa"` makes their features
            agree (`agreement_loss`); or a function `(encoder, images) -> scalar` to be minimised.
        target: class that `"uap"` is for.
        eps: $\\varepsilon$, largest change of a pixel.
        epochs: number of passes over the images.
        batch_size: number of images of a step.
        step: $a$; 0.3/8 of `eps` by default, as in the paper.
        seed: seed of start and order.

    Returns:
        The trigger, which rounds to eight bits.

    Raises:
        ValueError: on images outside [0, 1], `"uap"` without a target, an encoder that gives NaN, or settings out of
            range.

    Reference:
        Section 4.2, poisoning feature augmentation.
    """
    images(x, unit=True)
    if len(x) < 2 or whole("batch_size", batch_size, 1) < 2:
        raise ValueError(f"expected two images or more in x and in a batch, got {len(x)} and {batch_size}")
    loss = _objective(encoder, objective, target)
    step = _step(eps, step, 0.3 / 8)
    generator = torch.Generator().manual_seed(seed)
    with _frozen(encoder) as device:
        delta = eps * (2 * torch.rand(x.shape[1:], generator=generator, dtype=x.dtype) - 1).to(device)
        for _ in range(whole("epochs", epochs, 0)):
            for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                if len(rows) < 2:
                    continue  # one image has none to agree with
                delta.requires_grad_(True)
                triggered = (x[rows.to(x.device)].to(device) + delta).clamp(0, 1)
                (gradient,) = torch.autograd.grad(_finite(loss(encoder, triggered)), delta)
                delta = (delta.detach() - step * gradient.sign()).clamp(-eps, eps)
    return AdditiveTrigger(delta.to(x.device))


def _objective(encoder: ImageTextEncoder, objective: str | Objective, target: int | None) -> Objective:
    if callable(objective):
        return objective
    if one_of("objective", objective, ["uap", "cfa"]) == "cfa":
        return agreement_loss
    if target is None:
        raise ValueError("the objective 'uap' needs a target class, got target=None")
    chosen = whole("target", target, 0, encoder.num_classes - 1)
    return lambda encoder, x: target_loss(encoder, x, chosen)


def _step(eps: float, step: float | None, share: float) -> float:
    at_least("eps", eps, 0)
    return share * eps if step is None else positive("step", step)


def _ball(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest pixels in [0, 1] whose distance from x is at most eps, exactly: rounding may add to it."""
    wide = x.double()
    low, high = (wide - eps).to(x.dtype), (wide + eps).to(x.dtype)
    low = torch.where(wide - low.double() > eps, torch.nextafter(low, x), low)
    high = torch.where(high.double() - wide > eps, torch.nextafter(high, x), high)
    return low.clamp(min=0), high.clamp(max=1)


@contextmanager
def _frozen(encoder: ImageTextEncoder) -> Iterator[torch.device]:
    """The encoder in evaluation mode, with no gradient for its weights; gives its device."""
    with untouched(encoder, training=False), torch.enable_grad():
        encoder.requires_grad_(False)
        yield encoder.text_features.device


def _finite(loss: Tensor) -> Tensor:
    if not bool(loss.isfinite()):
        raise ValueError("the encoder gives features that are NaN or infinite")
    return loss
