"""Candidates in one batch and negatives at once, against the authors' loops over labels and examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.local.physical_ff import PhysicalBlock, PhysicalLocalNet
from torchfolio.local.physical_systems import MultimodeOptics


def peers(bench: Any) -> None:
    x, y = torch.rand(64, 64), torch.arange(64) % 10
    blocks = [PhysicalBlock(MultimodeOptics(w, 50), 50, in_features=w) for w in (74, 50)]
    net = PhysicalLocalNet(blocks, 10, 64, standardize=False).fit(x, y, epochs=1)
    generator = torch.Generator().manual_seed(0)
    many, one = torch.arange(10).repeat(144), net.scale(x[:1])
    drawn = np.random.default_rng(0)
    bench.compare(
        "wrong labels of 1,440 examples",
        ours=lambda: net.wrong_labels(many, generator),
        loop=lambda: [drawn.choice([c for c in range(10) if c != int(label)]) for label in many],
    )
    bench.compare(
        "class of one example",
        ours=lambda: net.predict(x[:1]),
        loop=lambda: [net.layers(net.embed(one, torch.tensor([c]))) for c in range(10)],
    )
    bench.compare("an epoch of 64", ours=lambda: net.partial_fit(x, y), loop=lambda: _authors_epoch(net, x, y, drawn))


def _authors_epoch(net: PhysicalLocalNet, x: Tensor, y: Tensor, drawn: np.random.Generator) -> None:
    """Batches of 64, negatives by a loop; training and test sets of 1,440 and 360 are scored in every batch."""
    torch.tensor([drawn.choice([c for c in range(10) if c != int(label)]) for label in y])
    net.partial_fit(x, y)
    for n in (1440, 360):
        h = net.scale(x.repeat(n // 64 + 1, 1)[:n])
        for c in range(10):
            net.layers(net.embed(h, torch.full((n,), c)))
