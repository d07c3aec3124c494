"""Overhead of `fit` with `Backprop` over a hand-written PyTorch loop.

ResNet-20 on batches of 128 images of CIFAR-10's shape, SGD with momentum, float32; both take the same steps from the
same weights and end with the same weights. Whole calls are timed in alternation, the start of `fit` (Fabric, checks,
the example's forward pass) included. Run it with

    python benchmarks/bench_fit.py [--steps 20] [--rounds 9] [--device cpu]

It exits with 1 where the median ratio is above 1.03. On two cores of an x86 server (torch 2.13, 20 steps, 9 rounds)
`fit` took 0.99 of the loop's time (0.94 to 1.12).
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import fit
from torchfolio.engine.loader import TensorBatches
from torchfolio.measure import alternate
from torchfolio.models import ResNetCIFAR

LIMIT = 1.03
BATCH = 128
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, order: Tensor) -> None:
    """One epoch as anybody would write it."""
    optimizer = SGD(net.parameters())
    net.train()
    for rows in order.split(BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps in each call")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    examples = BATCH * arguments.steps
    x = torch.randn(examples, 3, 32, 32, device=device)
    y = torch.randint(10, (examples,), device=device)
    order = TensorBatches([x], BATCH, seed=0).order(0).to(device)
    start = ResNetCIFAR(20).to(device)
    nets: dict[str, nn.Module] = {}

    def hand() -> None:
        nets["hand"] = copy.deepcopy(start)
        by_hand(nets["hand"], x, y, order)

    def fitted() -> None:
        nets["fit"] = copy.deepcopy(start)
        fit(nets["fit"], (x, y), optimizer=SGD, batch_size=BATCH, device=arguments.device, progress=False)

    times = alternate(hand=hand, fit=fitted, repeats=arguments.rounds)
    for a, b in zip(nets["hand"].parameters(), nets["fit"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    print(times)
    print(f"median ratio {times.ratio('fit'):.4f}, at most {LIMIT} wanted")
    return int(times.ratio("fit") > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
