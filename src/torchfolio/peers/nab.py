"""Poisoning a set, and an epoch of the defence's batches, against the lines that one would write for them."""

from __future__ import annotations

from typing import Any

import torch

from torchfolio.backdoor import AllToOne, PatchTrigger, poison
from torchfolio.backdoor.nab import NAB, PrecomputedIsolator, PrecomputedRelabeler, Stamp
from torchfolio.data import CropFlip
from torchfolio.engine.loader import as_batches


def peers(bench: Any) -> None:
    x, y = torch.rand(10_000, 3, 32, 32), torch.randint(10, (10_000,))
    trigger = PatchTrigger.checkerboard((3, 32, 32))
    others = (y != 0).nonzero()[:, 0]

    def poisoned_by_hand() -> None:
        rows = others[torch.randperm(len(others))[:1000]]
        images, labels = x.clone(), y.clone()
        chosen = images[rows]
        images[rows] = (255 * torch.lerp(chosen, trigger.pattern, trigger.mask)).round() / 255
        labels[rows] = 0

    bench.compare(
        "poison 10 % of 10,000 images of 32 x 32",
        ours=lambda: poison((x, y), trigger, AllToOne(0, 10), rate=0.1, seed=0).tensors(),
        by_hand=poisoned_by_hand,
    )
    mask, flip, stamp = torch.rand(len(x)) < 0.05, CropFlip(padding=0), Stamp(value=0.5)
    isolated = NAB(PrecomputedIsolator(mask), PrecomputedRelabeler((y + 1) % 10), stamp, augment=flip)
    data = isolated.prepare((x, y))

    def epoch() -> None:
        for _ in as_batches(data, 128, seed=0).epoch(0):
            pass

    def epoch_by_hand() -> None:
        for rows in torch.randperm(len(x)).split(128):
            images, _ = flip(x[rows]), data.pseudo_labels[rows]
            images[mask[rows], :, :2, :2] = 0.5

    bench.compare("an epoch of 10,000 images of 32 x 32, flipped, in batches of 128", ours=epoch, by_hand=epoch_by_hand)
