"""How well BaDExpert tells triggered inputs with few clean examples and nothing set by hand, over seeds.

Three victims, a tenth of whose training images carry a trigger of class 0: a perceptron without batch norm on digits of 8x8 with a
patch in the corner (150 clean images), a small convolutional network on digits with a faint pattern all over (150), and one on
CIFAR-10 at 16x16 with such a pattern (500). Run it with

    python benchmarks/few_clean_examples.py [--seeds 10] [--only perceptron]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from torchfolio.backdoor.badexpert import BaDExpert
from torchfolio.backdoor.evaluation import evaluate_input_detector
from torchfolio.backdoor.labels import AllToOne
from torchfolio.backdoor.poison import poison, poisoned_test
from torchfolio.backdoor.triggers import BlendTrigger, PatchTrigger
from torchfolio.backdoor.victims import default_net
from torchfolio.backdoor.zoo import fit_classifier
from torchfolio.data import DataSplits, load


def perceptron(data: DataSplits) -> nn.Module:
    """Three linear layers."""
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, data.num_classes)]
    return nn.Sequential(nn.Flatten(), *layers)


@dataclass(frozen=True)
class Case:
    """Data, a trigger, a victim, and the number of clean examples."""

    name: str
    trigger: Callable[[tuple[int, ...]], Any]
    net: Callable[[DataSplits], nn.Module]
    epochs: int
    lr: float
    clean: int
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = {
    "perceptron": Case(
        "digits", lambda shape: PatchTrigger.checkerboard(shape, size=2, margin=0), perceptron, 20, 0.05, 150
    ),
    "digits": Case("digits", lambda shape: BlendTrigger.noise(shape, alpha=0.2, seed=0), default_net, 12, 0.1, 150),
    "photographs": Case(
        "cifar10", lambda shape: BlendTrigger.noise(shape, alpha=0.2, seed=0), lambda data: default_net(data, 16), 15, 0.1,
        500, {"image_size": 16, "train_size": 10_000, "test_size": 3000},
    ),
}  # fmt: skip


def area(case: Case, data: DataSplits, seed: int) -> float:
    """AUROC of the filter, of triggered against clean test images."""
    trigger, labels = case.trigger(data.shape), AllToOne(0, data.num_classes)
    torch.manual_seed(seed)
    net = case.net(data)
    poisoned = poison(data.train.tensors, trigger, labels, rate=0.1, seed=seed)  # pyright: ignore[reportArgumentType]
    fit_classifier(net, poisoned, epochs=case.epochs, lr=case.lr, seed=seed)
    x, y = data.test.tensors
    trusted, test = (x[: case.clean], y[: case.clean]), (x[case.clean :], y[case.clean :])
    detector = BaDExpert(seed=seed).fit(net, trusted)
    return evaluate_input_detector(detector, net, test, poisoned_test(test, trigger, labels)).auroc


def main() -> None:
    """A line for each victim: the mean, the smallest, and how many are at least 0.95."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", choices=list(CASES))
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    for name in [options.only] if options.only else CASES:
        case = CASES[name]
        data = load(case.name, normalize=False, **case.arguments)
        areas = np.array([area(case, data, seed) for seed in range(options.seeds)])
        print(
            f"{name}: mean {areas.mean():.3f}, least {areas.min():.3f}, {(areas >= 0.95).sum()} of {len(areas)} at least 0.95"
        )


if __name__ == "__main__":
    main()
