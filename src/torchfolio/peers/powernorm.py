"""Forward and backward of one norm on 4,096 tokens of 512 channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from torchfolio.layers.powernorm import PowerNorm, SequenceBatchNorm
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    x, g = torch.randn(8, 512, 512), torch.randn(8, 512, 512)
    norms: dict[str, nn.Module] = {
        "ours": PowerNorm(512, warmup_steps=0, num_groups=None), "layer_norm": nn.LayerNorm(512),
        "with_group_scaling": PowerNorm(512, warmup_steps=0, num_groups=8),
        "batch_norm": SequenceBatchNorm(512),
    }  # fmt: skip

    def step(norm: nn.Module) -> None:
        norm(x.requires_grad_()).backward(g)

    calls: dict[str, Any] = {name: partial(step, norm) for name, norm in norms.items()}
    bench.compare("forward and backward, 4,096 tokens x 512", **calls)
