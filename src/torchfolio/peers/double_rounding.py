"""One batch at four widths, beside four steps of the float network and of LSQ from elementary operations."""

from __future__ import annotations

import copy
from typing import Any

import torch

from torchfolio.efficiency.double_rounding import MultiPrecision, convert
from torchfolio.engine.recipes import adam
from torchfolio.experiments._lsq import elementary
from torchfolio.experiments.double_rounding import BITS, network
from torchfolio.runs.bench import training_step


def peers(bench: Any) -> None:
    net = network((1, 28, 28), 10, (32, 64, 64))
    batch = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))
    ours = convert(net, BITS, example=batch[0])
    lsq = elementary(convert(net, BITS, example=batch[0], scale="separate"))
    plain = training_step(copy.deepcopy(net), batch, optimizer=adam(1e-3))
    bench.compare(
        "a batch of 128 at 4 widths",
        ours=training_step(ours, batch, MultiPrecision(), adam(1e-3)),
        float32_steps=lambda: [plain() for _ in BITS],
        lsq=training_step(lsq, batch, MultiPrecision(alrs=None), adam(1e-3)),
    )
