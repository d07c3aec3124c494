"""A step of a later task beside the host rule's, the input form and all rows; a subspace beside one by an SVD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.engine import LearningRule
from torchfolio.experiments.hlop import SCALES, network, protected
from torchfolio.runs.bench import Bench
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.hlop import HLOP, HebbianSubspace


def peers(bench: Bench) -> None:
    s, x, y = SCALES["quick"], torch.randn(64, 784), torch.randint(10, (64,))

    def stepping(rule: LearningRule, **options: Any) -> Any:
        net = network(784, s.width)
        used = protected(s, rule, **options) if options else rule
        used.prepare(net, (x, y))
        if isinstance(used, HLOP):
            used.end_task()

        def step() -> None:
            net.zero_grad()
            used.step((x, y), Tensor.backward)

        return step

    for timesteps in (4, 6):

        def bptt(timesteps: int = timesteps) -> BPTT:
            return BPTT(F.cross_entropy, timesteps=timesteps)

        bench.compare(
            f"a step of 784-200-200-10, T = {timesteps}, 64 images",
            ours=stepping(bptt(), form="weight"), host_rule=stepping(bptt()), input_form=stepping(bptt(), form="input"),
            all_rows=stepping(bptt(), form="input", rows="all"),
        )  # fmt: skip
    rows = torch.randn(8000, 784)

    def hebbian() -> None:
        lateral = HebbianSubspace(784, lr=0.001)
        lateral.grow(80)
        for batch in rows.split(64):
            lateral.update(batch)

    bench.compare(
        "80 rows for 8,000 activities of 784", ours=hebbian, svd=lambda: torch.linalg.svd(rows, full_matrices=False)
    )
