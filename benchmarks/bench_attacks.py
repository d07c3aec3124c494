"""Attacks against the adversarial robustness toolbox (ART): time, and what is found with as many queries.

A small convolutional network for the 8x8 digits. HopSkipJump works from decisions alone: every sample gets as many queries in
both, ART's own count. PGD makes 20 steps from 5 starts in both.

    pip install adversarial-robustness-toolbox
    python benchmarks/bench_attacks.py [--images 64] [--rounds 3]

Measured on one thread of a small cloud CPU that did other work too, medians of paired ratios of ART's time to ours:
HopSkipJump, some 2,400 queries a sample, 64 images 4.9 (4.5 to 5.0), 16 images 1.8, at a median L2 distance of 0.63 against
0.86; PGD 2.3 (2.2 to 2.4) on 64 images, 4.5 on 16, with equal shares misclassified (0.44). ART attacks sample by sample with
HopSkipJump, here all samples share a batch.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio import data, engine
from torchfolio.measure import alternate
from torchfolio.robustness import hop_skip_jump, pgd


class Counted(nn.Module):
    """Counts the examples that pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        return self.model(x.float())  # ART mixes in doubles


def network() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network and test images that it gets right."""
    torch.manual_seed(0)
    digits = data.load("digits", normalize=False)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    engine.fit(net, digits.train, epochs=15, optimizer=partial(torch.optim.Adam, lr=2e-3), progress=False)
    x, y = digits.test.tensors
    right = net.eval()(x).argmax(1) == y
    return net, x[right], y[right]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from art.attacks.evasion import HopSkipJump, ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    net, x, y = network()
    x, y = x[: arguments.images], y[: arguments.images]
    counted = Counted(net)
    classifier = PyTorchClassifier(counted, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0))
    pixels, hot = x.numpy(), np.eye(10, dtype=np.float32)[y.numpy()]
    found: dict[str, Any] = {}

    @torch.inference_mode()
    def tell() -> None:
        for name, changed in found.items():
            distance = (changed - x).flatten(1).norm(dim=1)
            wrong = net(changed).argmax(1) != y
            print(f"{name}: {float(wrong.float().mean()):.2f} misclassified, median L2 {float(distance.median()):.4f}")

    def art_hop() -> None:
        counted.count = 0
        attack = HopSkipJump(classifier, norm=2, max_iter=10, max_eval=1000, init_eval=100, verbose=False)
        found["art"] = torch.from_numpy(attack.generate(pixels, hot))

    art_hop()
    queries = counted.count // len(x)
    limit = torch.Generator().manual_seed(0)

    def our_hop() -> None:
        found["ours"] = hop_skip_jump(net, x, y, max_queries=queries, generator=limit).x_adv

    print(f"HopSkipJump, {queries} queries a sample")
    print(alternate(torchfolio=our_hop, art=art_hop, repeats=arguments.rounds))
    tell()

    def art_pgd() -> None:
        attack = ProjectedGradientDescent(classifier, "inf", 0.1, 0.02, max_iter=20, num_random_init=5, verbose=False)
        found["art"] = torch.from_numpy(attack.generate(pixels, hot))

    def our_pgd() -> None:
        found["ours"] = pgd(
            net, x, y, eps=0.1, alpha=0.02, steps=20, restarts=5, loss="ce", clip=(0.0, 1.0), generator=limit
        ).x_adv

    print("PGD")
    print(alternate(torchfolio=our_pgd, art=art_pgd, repeats=arguments.rounds))
    tell()


if __name__ == "__main__":
    main()
