"""Erasing in batches against one image at a time, as the authors' script does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchfolio.backdoor.clip_backdoor import clean_feature_erase
from torchfolio.backdoor.image_text import PrototypeEncoder
from torchfolio.backdoor.zoo import SmallConvNet

# Who poisons, by which trigger, and whether carriers are erased.


def peers(bench: Any) -> None:
    torch.manual_seed(0)
    guide = PrototypeEncoder(nn.Sequential(*list(SmallConvNet(3, 10, 16).children())[:-1]), torch.randn(10, 64))
    x = torch.rand(64, 3, 32, 32)
    for size in (16, 32):
        part = x[:, :, :size, :size].contiguous()
        bench.compare(
            f"erase 64 images {size}x{size}, 10 steps",
            repeats=3,
            ours=lambda part=part: clean_feature_erase(guide, part, steps=10),
            one_by_one=lambda part=part: clean_feature_erase(guide, part, steps=10, batch_size=1),
        )
