"""All pairs in one batch, against one pair after another with the same steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor import AdditiveTrigger, AllToOne
from torchfolio.backdoor.pair_triggers import AdditiveInversion
from torchfolio.backdoor.victims import victim
from torchfolio.data import load


def peers(bench: Any) -> None:
    data = load("digits", normalize=False, val=0)
    trigger, labels = AdditiveTrigger.shape("chessboard", data.shape, 0.1), AllToOne(0, 10)
    net = victim(data, trigger, labels, rate=0.15, epochs=4, lr=0.1, mode="append", seed=0).model.requires_grad_(False)
    x, y = data.train.tensors
    images = torch.stack([x[y == c][:10] for c in range(10)])
    pairs = [(s, t) for s in range(10) for t in range(10) if s != t]

    def one(x: Tensor, t: int) -> None:
        v = torch.zeros_like(x[0])
        for _ in range(200):
            v.requires_grad_(True)
            logits = net((x + v).clamp(0, 1))
            if (logits.argmax(1) == t).double().mean() >= 0.9 or v.detach().norm() > 20:
                return
            (g,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.full((len(x),), t)), v)
            v = (v - 0.1 * g / g.norm()).detach()

    bench.compare(
        "90 pairs, 10 images of 8 x 8 each", repeats=5,
        ours=lambda: AdditiveInversion().estimate(net, images, pairs),
        loop=lambda: [one(images[s], t) for s, t in pairs],
    )  # fmt: skip
