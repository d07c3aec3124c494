"""What a learning rule costs and what it gives, by depth: accuracy, memory and time on one task and one budget.

Small residual networks on 16x16 pictures, the same initial weights and the same order of batches for every rule. Memory is
the peak of what a step on one batch keeps for its backward passes; time is the median step in alternation with backprop.
Rules for spiking networks train the same network with neurons in the place of its ReLUs, over four time steps. It writes the
table and the picture of docs/less_memory.md. Run it with

    python benchmarks/less_memory.py [--data cifar10] [--depths 14 20 32] [--train-size 1000] [--epochs 5] [--output docs]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import advice
import matplotlib.pyplot as plt
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
        return super().prepare(spiking(model), example)

    def predictor(self, model: nn.Module) -> nn.Module:
        return super().predictor(spiking(model))


def spiking(model: nn.Module) -> nn.Module:
    """The network with neurons in the place of its ReLUs, where that has not been done."""
    return model if any(isinstance(m, LIF) for m in model.modules()) else to_spiking(model, partial(LIF, tau=1.1))


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


def measure(task: Task) -> list[dict[str, Any]]:
    """One row for every rule at one depth."""
    data = load(
        task.data, train_size=task.train_size, test_size=task.test_size, val=task.val_size, image_size=task.image_size
    )
    steps: dict[str, Any] = {name: stepper(task, data, rule()) for name, rule in RULES.items()}
    times = alternate(**steps).to_frame()
    rows = []
    for name, rule in RULES.items():
        torch.manual_seed(0)
        accuracy: Any = train(task, data, rule(), seed=0)["accuracy"]
        saved = step_cost(task, data, rule())["saved_mb"]
        ratio: Any = times.loc[name, "ratio"]
        rows.append({"depth": task.depth, "rule": name, "saved, MB": round(saved, 2),
                     "time of a step": round(float(ratio), 2), "accuracy, %": round(float(accuracy), 1)})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Memory and time by depth, a line a rule; accuracy against memory at the largest depth."""
    figure, (memory, time, accuracy) = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    deepest = max(row["depth"] for row in rows)
    for k, name in enumerate(RULES):
        own = [row for row in rows if row["rule"] == name]
        style: Any = {"color": f"C{k}", "ls": "--" if name.startswith("spiking") else "-", "marker": "o", "ms": 4}
        depths = [row["depth"] for row in own]
        memory.plot(depths, [row["saved, MB"] for row in own], label=name, **style)
        time.plot(depths, [row["time of a step"] for row in own], **style)
        last = next(row for row in own if row["depth"] == deepest)
        accuracy.plot(last["saved, MB"], last["accuracy, %"], "o", color=f"C{k}")
    memory.set(xlabel="layers", ylabel="saved for backward (MB)", yscale="log")
    time.set(xlabel="layers", ylabel="time of a step (backprop: 1)", yscale="log")
    accuracy.set(xlabel="saved for backward (MB)", ylabel="test accuracy (%)", xscale="log", title=f"{deepest} layers")
    for ax in (memory, time, accuracy):
        ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a named set of images; digits needs no download")
    parser.add_argument("--depths", type=int, nargs="+", default=[14, 20, 32])
    parser.add_argument("--train-size", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=advice.DOCS, help="a folder like docs/")
    arguments = parser.parse_args()
    given = {"train_size": arguments.train_size, "epochs": arguments.epochs, "data": arguments.data}
    task = Task(**given, test_size=1000) if arguments.data != "digits" else Task(**{**SMOKE, **given})
    rows = [row for depth in arguments.depths for row in measure(replace(task, depth=depth))]
    advice.write("less_memory", "python benchmarks/less_memory.py", rows, draw(rows), arguments.output)


if __name__ == "__main__":
    main()
