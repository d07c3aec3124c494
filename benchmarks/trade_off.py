"""What a learning rule costs and what it gives: accuracy, memory and time on one task and one budget.

A small residual network on the common local learning task (16x16 CIFAR-10, 6,000 images, 8 passes), the same
initial weights and the same order of batches for every rule; time is the median step in alternation with backprop.
Rules for spiking networks train the same network with neurons in the place of its ReLUs, over four time steps.
It prints a table and writes a picture. Run it with

    python benchmarks/trade_off.py [--data cifar10] [--seeds 3] [--output trade_off.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchfolio.data import DataSplits, load
from torchfolio.engine import Backprop, LearningRule
from torchfolio.experiments._local_learning import SMOKE, CheckpointedBackprop, Task, network, step_cost, train
from torchfolio.local.auglocal import AugLocal
from torchfolio.local.heads import LocalHeads
from torchfolio.local.man import MAN
from torchfolio.measure import alternate
from torchfolio.spiking.bptt import BPTT, SequenceRule
from torchfolio.spiking.conversion import to_spiking
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.sltt import SLTT

TIMESTEPS = 4


class Converting(SequenceRule):
    """Turns the ReLUs of the network that it is given into neurons."""

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        return super().prepare(to_spiking(model, partial(LIF, tau=1.1)), example)


class SpikingBPTT(Converting, BPTT):
    """Backpropagation through time on the converted network."""


class SpikingSLTT(Converting, SLTT):
    """SLTT on the converted network."""


RULES: dict[str, Callable[[], LearningRule]] = {
    "backprop": Backprop,
    "checkpointed backprop": CheckpointedBackprop,
    "linear heads": lambda: LocalHeads("linear"),
    "DGL": lambda: LocalHeads("dgl"),
    "AugLocal, depth 1": lambda: AugLocal(1),
    "AugLocal, depth 3": lambda: AugLocal(3),
    "MAN on DGL": lambda: MAN(momentum=0.98),
    "spiking, BPTT": lambda: SpikingBPTT(timesteps=TIMESTEPS),
    "spiking, SLTT": lambda: SpikingSLTT(timesteps=TIMESTEPS),
    "spiking, SLTT-1": lambda: SpikingSLTT(timesteps=TIMESTEPS, k=1, rescale=True),
}


def stepper(task: Task, data: DataSplits, rule: LearningRule) -> Callable[[], None]:
    """A training step by this rule on one batch."""
    x, y = (tensor[: task.batch_size].clone() for tensor in data.train.tensors)
    torch.manual_seed(0)
    module = rule.prepare(network(task, data), (x, y)).train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        rule.step((x, y), Tensor.backward)
        optimizer.step()

    return step


def measure(task: Task, seeds: int) -> pd.DataFrame:
    """One row for every rule."""
    sets = [
        load(
            task.data,
            seed=seed,
            train_size=task.train_size,
            test_size=task.test_size,
            val=task.val_size,
            image_size=task.image_size,
        )
        for seed in range(seeds)
    ]
    steps: dict[str, Any] = {name: stepper(task, sets[0], rule()) for name, rule in RULES.items()}
    times = alternate(**steps).to_frame()
    rows = []
    for name, rule in RULES.items():
        scores = []
        for seed, data in enumerate(sets):
            torch.manual_seed(seed)
            scores.append(train(task, data, rule(), seed=seed)["accuracy"])
        accuracy = pd.Series(scores, dtype=float)
        row = {"rule": name, "accuracy": accuracy.mean(), "sem": accuracy.sem() if seeds > 1 else 0.0}
        rows.append({**row, "step_ratio": times.loc[name, "ratio"], **step_cost(task, sets[0], rule())})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows).set_index("rule")


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy over memory, the area of a point proportional to the time of a step."""
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for k, (name, row) in enumerate(table.iterrows()):
        ax.errorbar(row["saved_mb"], row["accuracy"], row["sem"], color=f"C{k}", capsize=3)
        ax.scatter(row["saved_mb"], row["accuracy"], 80 * row["step_ratio"], color=f"C{k}", alpha=0.8)
        ax.annotate(str(name), (row["saved_mb"], row["accuracy"]), (8, 6), textcoords="offset points", fontsize=9)
    ax.set(xlabel="peak saved for backward (MB)", ylabel="test accuracy (%)")
    ax.set_title("area: time of a step", fontsize=10)
    ax.margins(x=0.2, y=0.15)
    ax.grid(alpha=0.3)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a named set of images; digits needs no download")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="trade_off.png")
    arguments = parser.parse_args()
    task = Task() if arguments.data == "cifar10" else replace(Task(**SMOKE), data=arguments.data)
    table = measure(task, arguments.seeds)
    print(table.round(3).to_string())
    draw(table).savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
