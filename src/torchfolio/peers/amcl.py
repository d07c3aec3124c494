"""Loss and gradient of 256 pairs with three heads of 128, beside NT-Xent once for each head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.models import ResNetCIFAR
from torchfolio.runs.bench import Bench
from torchfolio.training.amcl import AMCL, AMCLLoss, FixedTemperature, PairTemperature
from torchfolio.training.contrastive import nt_xent


def peers(bench: Bench) -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(3, 256, 128, requires_grad=True) for _ in "ab")
    loss = AMCLLoss(PairTemperature(128))

    def ours() -> None:
        loss(first, second).backward()

    def three() -> None:
        sum(nt_xent(a, b, 0.3) for a, b in zip(first, second, strict=True)).backward()  # pyright: ignore

    bench.compare("loss and gradient, 3 heads of 256 pairs x 128", ours=ours, nt_xent_three_times=three)

    x, y = torch.rand(128, 3, 32, 32), torch.zeros(128)
    adaptive, one = AMCL(), AMCL(heads=1, temperature=FixedTemperature(0.3), beta=0)
    modules = [rule.prepare(ResNetCIFAR(8), (x, y)) for rule in (adaptive, one)]

    def plain() -> None:
        parts: Any = modules[1]
        z = [parts["projector"](parts["encoder"](v))[0] for v in one.views(x)]
        nt_xent(z[0], z[1], 0.3).backward()

    bench.compare("gradient, 128 pairs x 3x32x32 with ResNet-8", ours=lambda: adaptive.step((x, y), Tensor.backward),
                  nt_xent_one_head=plain)  # fmt: skip
