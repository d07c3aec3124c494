"""A watermark that tracing is compared with: every copy of a classifier is blind to pixels of its own.

It betrays the copy that was attacked, where the attack left those pixels alone. That needs the clean image, which
tracing does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.engine import evaluate
from torchfolio.robustness.attacks import Attack


class Masked(nn.Module):
    """A classifier that does not see some pixels."""

    mask: Tensor

    def __init__(self, classifier: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x * self.mask)


def random_masks(count: int, x: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Masks of images like `x`, each with 5% of the pixels at zero."""
    return [(torch.rand(x.shape[1:], generator=generator) > 0.05).to(x) for _ in range(count)]


def watermarked(
    classifier: nn.Module, masks: list[Tensor], attack: Callable[[], Any], test: tuple[Tensor, Tensor], data: Any,
    attacked: int,
) -> dict[str, float]:  # fmt: skip
    """Attack the first copies from the clean image, so that no unseen pixel moves, and trace by what was left alone."""
    x, y = test
    accuracy = [evaluate(Masked(classifier, m), data)["accuracy"] for m in masks]
    right, total = 0.0, 0
    for k in range(attacked):
        found: Attack = attack()(Masked(classifier, masks[k]), x, y, start="zero")
        change = (found.x_adv - x).abs()
        left = torch.stack([(change * (1 - m)).flatten(1).sum(1) / (1 - m).sum() for m in masks], 1)
        right += float((left.argmin(1) == k)[found.success].sum())
        total += int(found.success.sum())
    return {"tracing": right / max(1, total), "accuracy": sum(accuracy) / len(accuracy)}
