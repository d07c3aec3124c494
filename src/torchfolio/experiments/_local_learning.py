"""The common task of the local learning rules: one small residual network, one budget, any rule.

The same seed gives every rule the same images, the same initial network and the same order of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from torchfolio.data import DataSplits
from torchfolio.engine import Backprop, LearningRule
from torchfolio.engine import layers as network_layers
from torchfolio.local.copied_layers import initialize
from torchfolio.measure import linear_probe, saved_bytes
from torchfolio.models import ResNetCIFAR, collect_features
from torchfolio.runs import setting, tasks

RuleFactory = Callable[[], LearningRule]


@dataclass(frozen=True)
class Task(tasks.OwnNetwork, tasks.Task):
    """The common task on a small residual network."""

    depth: int = setting(20, "depth of the residual network, 6n+2")
    widths: tuple[int, ...] = setting((8, 16, 32), "widths of its three stages")
    probes: bool = setting(False, "whether to measure, too, a linear probe on every layer")


SMOKE = {**tasks.SMOKE, "depth": 14}
FULL = {
    "train_size": None,
    "test_size": None,
    "val_size": 5000,
    "image_size": None,
    "depth": 32,
    "widths": (16, 32, 64),
    "epochs": 60,
    "crop": 4,
    "probes": True,
}


def network(task: Task, data: DataSplits, depth: int | None = None) -> nn.Module:
    """The task's residual network with the paper's initialisation, or the user's; one of another depth is residual."""
    if depth is None:
        return tasks.own_network(task, data, lambda: network(task, data, task.depth))
    net = ResNetCIFAR(depth, widths=task.widths, num_classes=data.num_classes, in_channels=data.shape[0], shortcut="B")
    return initialize(net)


def train(
    task: Task, data: DataSplits, rule: LearningRule, *, seed: int = 0, device: str | torch.device = "cpu"
) -> dict[str, object]:
    """Train the task's network by one rule: accuracies in percent, probes where asked for."""
    net = network(task, data)
    before = [p.detach().clone() for p in net.parameters()]
    outcome: dict[str, object] = {**tasks.train(task, data, net, rule, seed=seed, device=device)}
    moved = [not torch.equal(a, b.detach().cpu()) for a, b in zip(before, net.parameters(), strict=True)]
    outcome["weights_moved"] = sum(moved) / len(moved)
    if task.probes:
        outcome["probes"] = probe_layers(net, data)
    return outcome


def probe_layers(net: nn.Module, data: DataSplits, examples: int = 2000) -> list[float]:
    """Accuracy in percent of a linear classifier on the pooled features of every hidden layer."""
    x, y = (tensor[:examples] for tensor in data.train.tensors)
    names = [name for name, _ in network_layers(net, x[:2])][:-1]
    seen = collect_features(net, x, names, flatten="pool")
    unseen = collect_features(net, data.test.tensors[0], names, flatten="pool")
    return [100 * linear_probe(seen[n], y, unseen[n], data.test.tensors[1]) for n in names]


def step_cost(task: Task, data: DataSplits, rule: LearningRule, depth: int | None = None) -> dict[str, float]:
    """Peak megabytes saved for backward and gigaflops of one training step on a batch of the task's size."""
    # Copies, as training batches are: a slice would share the storage of the whole set and count as all of it.
    x, y = (tensor[: task.batch_size].clone() for tensor in data.train.tensors)
    module = rule.prepare(network(task, data, depth), (x, y)).train()
    peak = saved_bytes(lambda: rule.step((x, y), Tensor.backward), exclude=module).peak
    with FlopCounterMode(display=False) as counter:
        rule.step((x, y), Tensor.backward)
    return {"saved_mb": peak / 1e6, "gigaflops": counter.get_total_flops() / 1e9}


def costs(task: Task, data: DataSplits, rules: Mapping[str, RuleFactory], deep: Mapping[str, int]) -> dict[str, float]:
    """`step_cost` of every rule, and the megabytes that some of them save on a network of another depth.

    Args:
        task: an experiment's settings.
        data: data of `load`.
        rules: learning rules by name.
        deep: depth of another network, by the name of a rule.
    """
    found = {f"{name}_{k}": v for name, rule in rules.items() for k, v in step_cost(task, data, rule()).items()}
    for name, depth in deep.items():
        found[f"deep_{name}_saved_mb"] = step_cost(task, data, rules[name](), depth)["saved_mb"]
    return found


def stepper(rule: LearningRule, batch_size: int = 32) -> Callable[[], object]:
    """A training step of the common network (ResNet-20 shape, 16x16 images) by a rule, for timing."""
    x, y = torch.rand(batch_size, 3, 16, 16), torch.arange(batch_size) % 10
    net = initialize(ResNetCIFAR(20, widths=(8, 16, 32), shortcut="B"))
    rule.prepare(net, (x, y)).train()
    return lambda: rule.step((x, y), Tensor.backward)


class CheckpointedBackprop(Backprop):
    """Backprop that keeps the activations at segment borders alone and computes the others again.

    The peer of any rule that saves memory: about $\\sqrt{L}$ segments, the gradients of backprop.
    """

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        parts = [layer for _, layer in network_layers(model, example[0])]
        self.segments = max(1, round(len(parts) ** 0.5))
        self.parts = nn.Sequential(*parts)
        return super().prepare(model, example)

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> dict[str, Tensor | float]:
        x, y = batch
        logits = checkpoint_sequential(self.parts, self.segments, x, use_reentrant=False)
        loss = self.loss(logits, y)
        backward(loss)
        return {"loss": loss.detach()}
