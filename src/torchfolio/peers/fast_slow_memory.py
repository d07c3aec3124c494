"""Forward and backward of a batch of episodes: attention over the past beside matrices of fast weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.runs.bench import Bench
from torchfolio.training.fast_slow_memory import FastSlowMemoryNetwork
from torchfolio.training.meta_episodes import sine_episodes


def peers(bench: Bench) -> None:
    for hidden, width in ((40, 20), (200, 40)):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(1, hidden), nn.ReLU())
        net = FastSlowMemoryNetwork(encoder, 1, hidden=hidden, width=width)
        slow = FastSlowMemoryNetwork(encoder, 1, hidden=hidden, width=width, fast=False)
        x, y = sine_episodes(32)

        def matrices(net: FastSlowMemoryNetwork = net, x: Tensor = x, y: Tensor = y) -> None:
            state, outputs = net.init_state(len(x)), []
            for t in range(x.shape[1]):
                output, context = net.step(state, x[:, t])
                state = net.observe(state, context, y[:, t])
                outputs.append(output)
            F.mse_loss(torch.stack(outputs, 1), y).backward()

        bench.compare(
            f"32 sines of 20 points, {hidden} units",
            ours=lambda net=net, x=x, y=y: F.mse_loss(net(x, y), y).backward(),
            matrices=matrices,
            without_fast_path=lambda net=slow, x=x, y=y: F.mse_loss(net(x, y), y).backward(),
        )
