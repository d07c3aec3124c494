"""A step of the method beside its parts: the classifier's alone, and the loop that computes features for every use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.experiments._mask_training import classifier, masked
from torchfolio.experiments.noise_mask import SCALES
from torchfolio.runs.bench import Bench
from torchfolio.training.noise_mask import Reinforce


def peers(bench: Bench) -> None:
    s = SCALES["quick"]
    x, y = torch.randn(64, 1, 16, 16), torch.randint(20, (64,))
    net, rule = classifier(s), masked(s)
    pair = rule.prepare(net, (x, y))

    def ours() -> None:
        pair.zero_grad()
        rule.step((x, y), Tensor.backward)

    def plain() -> None:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()

    loop = official_step(masked(s).prepare(classifier(s), (x, y)), x, y)
    work = "forward and backward, 64 images of 16x16, 64 cells"
    bench.compare(work, repeats=15, ours=ours, official_loop=loop, classifier_alone=plain)


def official_step(pair: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward and backward with features and heads twice, upsampling, and a blur in two dimensions.

    Args:
        pair: module with the `policy`, of 8 by 8 cells, and the `classifier`.
        x: images `[N, 1, 16, 16]`.
        y: labels `[N]`.
    """
    line = torch.softmax(-0.5 * torch.arange(-1.0, 2.0) ** 2, 0)
    kernel, parts = (line[:, None] * line)[None, None], dict[str, Any](pair.named_children())

    def step() -> None:
        pair.zero_grad()
        parts["policy"](x)  # the base
        beta = parts["policy"](x)
        cells = beta.sample().clamp(1e-6, 1 - 1e-6)
        mask = F.interpolate(cells.view(-1, 1, 8, 8), size=(16, 16))
        mask = F.conv2d(F.pad(mask, (1, 1, 1, 1), mode="reflect"), kernel)
        losses = F.cross_entropy(parts["classifier"](x * mask), y, reduction="none")
        Reinforce()(losses, beta.log_prob(cells), losses.mean()).backward()

    return step
