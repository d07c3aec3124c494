"""A training step on 128 images of 32x32, teacher and student residual networks, beside ordinary distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchfolio.engine import LearningRule
from torchfolio.engine.recipes import sgd
from torchfolio.experiments._one_head_distillation import OneHead
from torchfolio.models import ResNetCIFAR
from torchfolio.runs.bench import Bench, training_step
from torchfolio.training.dhkd import DHKD, kd_loss


def peers(bench: Bench) -> None:
    torch.manual_seed(0)
    teacher, x, y = ResNetCIFAR(20).eval(), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    with torch.no_grad():
        batch = (x, teacher(x), y)

    def step(rule: LearningRule) -> Callable[[], None]:
        return training_step(ResNetCIFAR(8), batch, rule, sgd(0.01, nesterov=False))

    kd = step(OneHead(kd_loss, 4.0))
    bench.compare("step, 128 x 3x32x32, stored logits", ours=step(DHKD(None)), kd=kd)
    aligned = step(DHKD(None, gradient_alignment=True))
    bench.compare("step with gradient alignment, 128 x 3x32x32, stored logits", ours=aligned, kd=kd)
