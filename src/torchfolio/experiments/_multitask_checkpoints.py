"""Checkpoints of three tasks, finetuned from one pretrained body; some of them carry a backdoor.

One small network is pretrained on a few images of every task and finetuned on each task by itself. The heads are
trained with the body, and frozen from then on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from torchfolio.backdoor import BlendTrigger, PatchTrigger, Trigger
from torchfolio.data import DataSplits
from torchfolio.engine import Backprop, LearningRule, fit
from torchfolio.engine.recipes import adam
from torchfolio.models import ViT
from torchfolio.runs import setting

__all__ = ["Attack", "Task", "body", "checkpoints", "make_tasks", "trigger"]

FEATURES = 128
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Attack:
    """Tasks, trainings, and the attack."""

    data: str = setting("mnist10k", "name of the images")
    tasks: Literal["rotations", "groups"] = setting(
        "rotations", '`"rotations"`: all images by quarter turns; `"groups"`: the classes in three groups'
    )
    network: Literal["conv", "vit"] = setting("conv", '`"conv"` or `"vit"`')
    pretrain_size: int = setting(150, "images of every task that the body is pretrained on")
    finetune_size: int = setting(2400, "images of every task")
    adapt_size: int = setting(1000, "unlabelled images of every task")
    test_size: int = setting(1000, "test images of every task")
    attackers: int = setting(1, "tasks, from the first, whose checkpoint is poisoned")
    trigger: Literal["patch", "blend"] = setting(
        "patch", '`"patch"`: a checkerboard in the corner; `"blend"`: a fixed noise pattern over the image'
    )
    poison_share: float = setting(0.3, "share of every batch of the attacker")
    attack_epochs: int = setting(6, "passes of the poisoned checkpoints")
    clean_epochs: int = setting(3, "passes of the others")
    attack_lr: float = setting(1e-3, "learning rate of Adam on the poisoned checkpoints")
    clean_lr: float = setting(5e-4, "learning rate of Adam on the others")
    batch_size: int = setting(32, "examples of a batch, in every training")


class Task(NamedTuple):
    """Images and labels of one task, and its frozen head."""

    shared: Pair
    own: Pair
    unlabelled: Tensor
    test: Pair
    head: nn.Linear


def make_tasks(settings: Attack, data: DataSplits, seed: int) -> list[Task]:
    """Disjoint images for pretraining, finetuning, adaptation and test of three tasks."""
    generator = torch.Generator().manual_seed(seed)
    train, test = _shuffled(data.train.tensors, generator), _shuffled(data.test.tensors, generator)
    tasks = []
    for k in range(3):
        x, y = _of_task(settings, train, k, data.num_classes)
        seen = settings.pretrain_size + settings.finetune_size
        first, tuned, rest = (slice(0, settings.pretrain_size), slice(settings.pretrain_size, seen), slice(seen, None))
        unlabelled = x[rest][: settings.adapt_size]
        if len(unlabelled) < settings.adapt_size:
            raise ValueError(f"{settings.data} has {len(x)} training images for a task, too few for these settings")
        x_test, y_test = _of_task(settings, test, k, data.num_classes)
        head = nn.Linear(FEATURES, int(y.max()) + 1)
        held_out = x_test[: settings.test_size], y_test[: settings.test_size]
        tasks.append(Task((x[first], y[first]), (x[tuned], y[tuned]), unlabelled, held_out, head))
    return tasks


def _shuffled(pair: tuple[Tensor, ...], generator: torch.Generator) -> Pair:
    order = torch.randperm(len(pair[0]), generator=generator)
    return pair[0][order], pair[1][order]


def _of_task(settings: Attack, pair: Pair, k: int, classes: int) -> Pair:
    x, y = pair
    if settings.tasks == "rotations":
        return torch.rot90(x, k, (2, 3)), y
    edges = [round(i * classes / 3) for i in range(4)]
    inside = (y >= edges[k]) & (y < edges[k + 1])
    return x[inside], y[inside] - edges[k]


def body(settings: Attack, shape: tuple[int, ...]) -> nn.Module:
    """The network that is merged: images to `FEATURES` numbers, no batch norm."""
    if settings.network == "vit":
        return ViT(num_classes=FEATURES, in_channels=shape[0], image_size=shape[1])
    side = -(-shape[1] // 4)
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * side * side, FEATURES), nn.ReLU(),
    )  # fmt: skip


class _Joint(LearningRule):
    """Cross-entropy of several tasks, each through its own head, on one body."""

    def __init__(self, tasks: list[Task]) -> None:
        self.heads = nn.ModuleList(task.head for task in tasks)

    def prepare(self, model: nn.Module, example: Any) -> nn.Module:
        self.model = model
        self.heads.to(example[0].device)
        return nn.ModuleList([model, self.heads])

    def step(self, batch: Any, backward: Any) -> dict[str, Tensor]:
        x, y, task = batch
        features = self.model(x)
        losses = [
            F.cross_entropy(head(features[task == k]), y[task == k], reduction="sum")
            for k, head in enumerate(self.heads)
            if (task == k).any()
        ]
        loss = torch.stack(losses).sum() / len(x)
        backward(loss)
        return {"loss": loss.detach()}


def checkpoints(
    settings: Attack, tasks: list[Task], shape: tuple[int, ...], seed: int
) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """The pretrained body, its checkpoints with poisoned ones among them, and all of them clean."""
    torch.manual_seed(seed)
    base = body(settings, shape)
    for task in tasks:
        task.head.reset_parameters()
    shared = [(*task.shared, torch.full_like(task.shared[1], k)) for k, task in enumerate(tasks)]
    joint = [torch.cat(parts) for parts in zip(*shared, strict=True)]
    fit(base, TensorDataset(*joint), rule=_Joint(tasks), optimizer=adam(1e-3), epochs=30, batch_size=32, seed=seed,
        progress=False)  # fmt: skip
    for task in tasks:
        task.head.requires_grad_(False)
    clean = [finetune(settings, base, task, None, seed) for task in tasks]
    stamp = trigger(settings, shape)
    bad = [finetune(settings, base, task, stamp, seed) for task in tasks[: settings.attackers]]
    return base, [*bad, *clean[settings.attackers :]], clean


class _Poisoned(Backprop):
    """Backprop on batches of which a share carries the trigger and the label 0."""

    def __init__(self, stamp: Trigger, share: float) -> None:
        super().__init__()
        self.stamp, self.share = stamp, share

    def step(self, batch: Any, backward: Any) -> Any:
        x, y = batch
        count = round(self.share * len(x))  # batches come shuffled: the first images are as good as any
        x = torch.cat([self.stamp(x[:count]), x[count:]])
        return super().step((x, torch.cat([torch.zeros_like(y[:count]), y[count:]])), backward)


def finetune(settings: Attack, base: nn.Module, task: Task, stamp: Trigger | None, seed: int) -> nn.Module:
    """A checkpoint of one task, poisoned where there is a trigger."""
    net = nn.Sequential(copy.deepcopy(base), task.head)
    rule = Backprop() if stamp is None else _Poisoned(stamp, settings.poison_share)
    epochs = settings.clean_epochs if stamp is None else settings.attack_epochs
    lr = settings.clean_lr if stamp is None else settings.attack_lr
    fit(net, task.own, rule=rule, optimizer=adam(lr), epochs=epochs, batch_size=settings.batch_size, seed=seed,
        progress=False)  # fmt: skip
    return net[0]


def trigger(settings: Attack, shape: tuple[int, ...]) -> Trigger:
    """The trigger of an attack."""
    if settings.trigger == "blend":
        return BlendTrigger(torch.rand(shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
    return PatchTrigger.checkerboard(shape, size=5 if shape[1] >= 20 else 3, margin=0)
