"""Bounds of a batch at once, against one input after another; and instances of VNN-COMP decided within a time limit.

    python benchmarks/bench_bounds.py [--batch 64] [--rounds 5]
    python benchmarks/bench_bounds.py --instances $TORCHFOLIO_DATA/vnncomp/acasxu --timeout 10 [--first 20]

Measured on one thread of a small cloud CPU that did other work too: intervals one by one take 44 times as long (29 to 53). CROWN
bounds take 0.88 of the batch's time one by one (0.82 to 0.89) at this size: a unit that is unstable for any input is bounded
for all of them. The boxes of a split are close to each other and share their unstable units.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.measure import alternate
from torchfolio.robustness.bounds import CrownSplit, crown, ibp
from torchfolio.robustness.properties import Box, classification
from torchfolio.robustness.soundness_bench import load, run_verifier


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ).requires_grad_(False)


def one_by_one(net: nn.Module, x: Tensor, tight: bool) -> list[Any]:
    prop = classification(0, 10, torch.float32)
    boxes = [Box.ball(one[None], 0.02) for one in x]
    return [crown(net, box, prop) if tight else ibp(net, box, prop) for box in boxes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--instances", type=Path)
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--first", type=int)
    arguments = parser.parse_args()
    if arguments.instances is not None:
        benchmark = load(arguments.instances)
        chosen = type(benchmark)(benchmark.folder, benchmark.instances[: arguments.first])
        table = run_verifier(chosen, CrownSplit(), arguments.timeout)
        print(table.drop(columns=["kind"]).to_string())
        print(table["status"].value_counts().to_string())
        return
    net, prop = network(), classification(0, 10, torch.float32)
    x = torch.rand(arguments.batch, 784)
    box = Box.ball(x, 0.02)
    with torch.no_grad():
        for name, tight in (("intervals", False), ("crown", True)):
            calls: dict[str, Any] = {
                "batch": lambda tight=tight: crown(net, box, prop) if tight else ibp(net, box, prop),
                "one_by_one": lambda tight=tight: one_by_one(net, x, tight),
            }
            print(name)
            print(alternate(**calls, repeats=arguments.rounds))


if __name__ == "__main__":
    main()
