"""Six copies by tracers beside six fine-tuned ones, each blind to pixels of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch

from torchfolio.data import load
from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.experiments._pixel_watermarks import Masked
from torchfolio.experiments._strided_classifiers import two_convolutions
from torchfolio.robustness.attack_tracing import separate


def peers(bench: Any) -> None:
    data = load("mnist10k", val=0, normalize=False)
    net = two_convolutions(data)

    def finetuned() -> None:
        for seed in range(6):
            mask = (torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(seed)) > 0.05).float()
            fit(Masked(copy.deepcopy(net), mask), data.train, optimizer=adam(1e-3), epochs=1, batch_size=64, seed=seed)

    bench.compare(
        "six copies, 125 steps of 64, MNIST",
        repeats=3,
        ours=lambda: separate(net, data.train, n_copies=6, steps=125),
        finetuning_each=finetuned,
    )
