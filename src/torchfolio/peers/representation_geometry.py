"""160 networks for 20 steps, side by side and one by one with autograd."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torchfolio.insight.representation_geometry import ShallowNetwork, random_clusters, train_side_by_side
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    tasks = [random_clusters(4, 100, generator=torch.Generator().manual_seed(k)) for k in range(160)]
    nets = [ShallowNetwork(100, 120, activation="tanh") for _ in tasks]

    def loop() -> None:
        for net, task in zip(nets, tasks, strict=True):
            optimizer = torch.optim.SGD([net.weight, net.bias], lr=0.1)
            means, labels = task.means.float(), task.labels.float()
            for _ in range(20):
                pick = torch.randint(4, (200,))
                x = means[pick] + 0.1 * torch.randn(200, 100)
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(net(x), labels[pick]).backward()
                optimizer.step()

    bench.compare(
        "20 steps of 160 networks, 100-120-1",
        repeats=3,
        ours=lambda: train_side_by_side(nets, tasks, steps=20),
        loop=loop,
    )
