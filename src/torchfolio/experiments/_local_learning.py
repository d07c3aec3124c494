"""The common task of the local learning rules: one small residual network, one budget, any rule.

The same seed gives every rule the same images, the same initial network and the same order of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from torchfolio.data import DataSplits
from torchfolio.data.augment import CropFlip
from torchfolio.engine import Backprop, LearningRule, evaluate, fit
from torchfolio.engine import layers as network_layers
from torchfolio.local.auglocal import initialize
from torchfolio.measure import linear_probe, saved_bytes
from torchfolio.models import ResNetCIFAR, collect_features
from torchfolio.runs import Run

RuleFactory = Callable[[], LearningRule]


@dataclass(frozen=True)
class Task:
    """Data, network and budget.

    Attributes:
        data: name of the data set.
        train_size: training images; `None` takes all.
        test_size: test images; `None` takes all.
        val_size: images held out of the training part.
        image_size: images are box-downsampled to this side; `None` keeps them.
        depth: of the residual network, 6n+2.
        widths: of its three stages.
        epochs: passes over the training images.
        batch_size: images in a batch.
        lr: peak of the one-cycle learning rate.
        momentum: Nesterov momentum.
        weight_decay: of all trained weights.
        crop: pixels of padding before a random crop; flips are always on for photographs.
        probes: also measure a linear probe on every layer.
    """

    data: str = "cifar10"
    train_size: int | None = 6000
    test_size: int | None = 2000
    val_size: int = 1000
    image_size: int | None = 16
    depth: int = 20
    widths: tuple[int, ...] = (8, 16, 32)
    epochs: int = 8
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    crop: int = 0
    probes: bool = False


SMOKE = {"data": "digits", "train_size": 512, "test_size": None, "val_size": 100, "image_size": None, "depth": 14}
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


def load(run: Run) -> DataSplits:
    """The task's images."""
    task: Task = run.settings
    return run.data(
        task.data, train_size=task.train_size, test_size=task.test_size, val=task.val_size, image_size=task.image_size
    )


def network(task: Task, data: DataSplits, depth: int | None = None) -> nn.Module:
    """The task's residual network with the paper's initialisation."""
    net = ResNetCIFAR(
        depth or task.depth, widths=task.widths, num_classes=data.num_classes, in_channels=data.shape[0], shortcut="B"
    )
    return initialize(net)


def train(
    task: Task, data: DataSplits, rule: LearningRule, *, seed: int = 0, device: str | torch.device = "cpu"
) -> dict[str, object]:
    """Train the task's network by one rule: accuracies in percent, probes where asked for."""
    net = network(task, data)
    before = [p.detach().clone() for p in net.parameters()]
    photographs = data.shape[0] == 3
    steps = task.epochs * -(-len(data.train) // task.batch_size)
    result = fit(
        net,
        data.train,
        val=data.val,
        evaluate=getattr(rule, "evaluate", None),
        rule=rule,
        optimizer=partial(SGD, lr=task.lr, momentum=task.momentum, nesterov=True, weight_decay=task.weight_decay),
        scheduler=partial(_one_cycle, max_lr=task.lr, total_steps=steps),
        epochs=task.epochs,
        batch_size=task.batch_size,
        augment=CropFlip(padding=task.crop, flip=True) if photographs else None,
        seed=seed,
        device=device,
    )
    # Rules for sequences say themselves how their network is run.
    score = getattr(rule, "evaluate", evaluate)
    moved = [not torch.equal(a, b.detach().cpu()) for a, b in zip(before, net.parameters(), strict=True)]
    outcome: dict[str, object] = {
        "accuracy": 100 * score(net, data.test)["accuracy"],
        "val_accuracy": 100 * score(net, data.val)["accuracy"],
        "weights_moved": sum(moved) / len(moved),
        "steps": result.steps,
    }
    if task.probes:
        outcome["probes"] = probe_layers(net, data)
    return outcome


def _one_cycle(optimizer: Optimizer, max_lr: float, total_steps: int) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=max_lr, total_steps=total_steps, cycle_momentum=False)


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
