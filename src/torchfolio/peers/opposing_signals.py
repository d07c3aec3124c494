"""Twenty steps on full batches that keep every example's loss, beside the same without and with one more pass."""

from __future__ import annotations

import torch
from torch import nn

from torchfolio.insight.opposing_signals import trace
from torchfolio.models import MLP
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    x, y = torch.randn(1000, 3072), torch.randint(10, (1000,))

    def steps(extra: bool) -> None:
        net = MLP(3072, 10, (64, 64))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            if extra:
                with torch.no_grad():
                    nn.functional.cross_entropy(net(x), y, reduction="none")

    bench.compare(
        "20 steps of 1,000 images, losses of all",
        repeats=5,
        ours=lambda: trace(MLP(3072, 10, (64, 64)), (x, y), lr=0.01, steps=20, sharpness_every=0),
        unrecorded=lambda: steps(False),
        second_pass=lambda: steps(True),
    )
