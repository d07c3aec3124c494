"""Ten trainings in one pass beside a loop over seeds: the fastest that a user would write, and the engine's."""

from __future__ import annotations

import torch
from torch import nn

from torchfolio.engine import fit
from torchfolio.engine.recipes import sgd
from torchfolio.models import MLP
from torchfolio.runs.bench import Bench
from torchfolio.training.episodes import fit_episodes, train_episodes


def peers(bench: Bench) -> None:
    x, y = torch.randn(640, 64), torch.randint(10, (640,))
    seeds = list(range(10))

    def build() -> nn.Module:
        return MLP(64, 10, (16,))

    def loop() -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            net = build()
            optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, fused=True)
            for _ in range(5):
                for rows in torch.randperm(len(x)).split(16):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                    optimizer.step()

    def engine() -> None:
        optimizer = sgd(0.1, 0.9, 5e-4, nesterov=False)
        train_episodes(build, lambda net, seed: fit(net, (x, y), optimizer=optimizer, epochs=5, batch_size=16, seed=seed,
                                                    device="cpu", progress=False), seeds)  # fmt: skip

    bench.compare(
        "10 trainings of 64-16-10 for 200 steps of 16", repeats=5,
        ours=lambda: fit_episodes(build, x, y, seeds, phases=((0.1, 5),), batch_size=16),
        loop_over_seeds=loop, loop_of_fit=engine,
    )  # fmt: skip
