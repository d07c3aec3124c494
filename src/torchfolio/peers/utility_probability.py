"""Sequences of 50 sources at all rationalities of the grid, in one batch and one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from torchfolio.experiments._synonym_translation import FIRST, SYMBOLS, Decoder
from torchfolio.insight.utility_probability import GRID, sample_sequences
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    torch.manual_seed(0)
    net = Decoder(64).eval()
    prefix = torch.randint(FIRST, FIRST + SYMBOLS, (50, 9))
    rows, kappas = prefix.repeat(len(GRID), 1), torch.tensor(GRID).repeat_interleave(len(prefix))

    @torch.no_grad()
    def step(tokens: Tensor) -> Tensor:
        return net(tokens)[..., -1]

    bench.compare(
        f"{len(GRID)} rationalities of 50 sources",
        ours=lambda: sample_sequences(step, rows, -1, 9, rationality=kappas),
        loop=lambda: [sample_sequences(step, prefix, -1, 9, rationality=kappa) for kappa in GRID],
    )
