"""A policy of masks trained alone, beside a frozen classifier that looks at the left half of the image.

Masking the right half costs this classifier nothing, so a policy that learns from its losses lets the left half through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.engine import fit
from torchfolio.engine.recipes import adam, sgd
from torchfolio.training.noise_mask import NoiseMaskPretraining, Reinforce

__all__ = ["GRID", "ShuffledRewards", "train_alone"]

Part = tuple[Tensor, Tensor]

LR, GRID = 3.0, 4
"""Of the policy: the credit is a mean over cells, so that few cells learn faster and with less noise."""


class ShuffledRewards(Reinforce):
    """The negative control: rewards of other images, by draws of its own, so that masks are drawn as ever."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.draws = seed, torch.Generator().manual_seed(seed)

    def __call__(self, losses: Tensor, log_p: Tensor, baseline: Tensor | float) -> Tensor:
        order = torch.randperm(len(losses), generator=self.draws).to(losses.device)
        return super().__call__(losses[order], log_p, baseline)


class LeftHalf(nn.Module):
    """A linear classifier of the left half of the image."""

    def __init__(self, side: int, classes: int = 20) -> None:
        super().__init__()
        self.width, self.read = side // 2, nn.Linear(side * (side // 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x[..., : self.width].flatten(1))


def train_alone(
    train: Part, val: Part, make: Callable[[], NoiseMaskPretraining], *, steps: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Train the classifier, freeze it, and train the policy; expected masks, and the loss before and after.

    Args:
        train: grey images and labels that both learn from.
        val: images and labels on which masks and losses are measured.
        make: makes the rule with its policy, whose grid is `GRID`.
        steps: steps of the policy.
        seed: seed of both trainings.
        device: device of both.

    Returns:
        `difference` of the mean mask on the left and on the right half, `before` and `after`, and the first masks.
    """
    x, y = (t.to(device) for t in val)
    net = LeftHalf(x.shape[-1])
    fit(net, train, optimizer=adam(3e-3), epochs=5, batch_size=64, seed=seed, device=device)
    net.requires_grad_(False)
    rule = make()
    rule.prepare(net, (x[:8], y[:8]))

    def expected_loss() -> float:
        losses = [nn.functional.cross_entropy(net(x * rule.masks(x)), y) for _ in range(8)]
        return float(torch.stack(losses).mean())

    before = expected_loss()
    fit(net, train, rule=rule, optimizer=sgd(LR), max_steps=steps, batch_size=256, seed=seed, drop_last=True,
        device=device)  # fmt: skip
    net.eval()
    mask, half = rule.masks(x, expected=True), x.shape[-1] // 2
    difference = float(mask[..., :half].mean() - mask[..., half:].mean())
    return {"difference": difference, "before": before, "after": expected_loss(), "mask": mask[:8].cpu()}
