"""Measures DAM: does a merged network inherit a checkpoint's backdoor, and do the learned masks close it?

One small network is pretrained on a few images of every task and finetuned on each task by itself; one checkpoint
carries a backdoor. Masks and coefficients are learned on unlabelled images that neither training nor test has.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.adaptation.dam import ConcreteMerging, DefenseAwareMerging
from torchfolio.adaptation.merging import AdaMerging, MergeResult, average, task_arithmetic
from torchfolio.backdoor import BlendTrigger, PatchTrigger, Trigger
from torchfolio.data import DataSplits
from torchfolio.engine import Backprop, LearningRule, fit
from torchfolio.models import ViT
from torchfolio.runs import Results, Run


@dataclass(frozen=True)
class Settings:
    """Tasks, attack and merging.

    Attributes:
        data: name of the images.
        tasks: `"rotations"`: all images by quarter turns; `"groups"`: the classes in three groups.
        network: `"conv"` or `"vit"`.
        pretrain_size: images shared by all tasks.
        finetune_size: images of every task.
        adapt_size: unlabelled images of every task.
        test_size: test images of every task.
        attackers: tasks, from the first, whose checkpoint is poisoned.
        trigger: `"patch"`: a checkerboard in the corner; `"blend"`: a fixed noise pattern over the image.
        poison_share: of every batch of the attacker.
        attack_epochs: of the poisoned checkpoints.
        clean_epochs: of the others.
        attack_lr: of Adam on the poisoned checkpoints.
        clean_lr: of Adam on the others.
        weight: the coefficient of every task vector.
        steps: of mask training.
        alpha: weight of safety.
        rate: learning rate of the masks.
        epsilon: bound of the perturbations. A patch of a strength below 0.3 flips hardly any prediction.
        delta_steps: steps of the search for perturbations, which starts anew at every step of the masks.
        batch_size: of every training.
        extra: also measure the entropy form of safety, plain averages and AdaMerging.
    """

    data: str = "mnist10k"
    tasks: Literal["rotations", "groups"] = "rotations"
    network: Literal["conv", "vit"] = "conv"
    pretrain_size: int = 150
    finetune_size: int = 2400
    adapt_size: int = 1000
    test_size: int = 1000
    attackers: int = 1
    trigger: Literal["patch", "blend"] = "patch"
    poison_share: float = 0.3
    attack_epochs: int = 6
    clean_epochs: int = 3
    attack_lr: float = 1e-3
    clean_lr: float = 5e-4
    weight: float = 0.7
    steps: int = 120
    alpha: float = 0.05
    rate: float = 2e-2
    epsilon: float = 0.3
    delta_steps: int = 4
    batch_size: int = 32
    extra: bool = True


SCALES = {
    "smoke": Settings(
        data="digits",
        finetune_size=600,
        adapt_size=200,
        test_size=300,
        steps=10,
        attack_epochs=2,
        clean_epochs=1,
        extra=False,
    ),
    "quick": Settings(),
    "full": Settings(
        data="cifar10",
        tasks="groups",
        network="vit",
        pretrain_size=3000,
        finetune_size=8000,
        attackers=2,
        trigger="blend",
        attack_epochs=12,
        clean_epochs=8,
    ),
}

Pair = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """Images and labels of one task, and its frozen head."""

    shared: Pair
    own: Pair
    unlabelled: Tensor
    test: Pair
    head: nn.Linear


def run(run: Run[Settings]) -> None:
    """Train the checkpoints, merge them in every way, then attack what came out."""
    settings = run.settings
    data = run.data(settings.data, normalize=False, val=0)
    tasks = make_tasks(settings, data, run.seed)
    base, poisoned, clean = checkpoints(settings, tasks, data.shape, run.seed)
    stamp = trigger(settings, data.shape)

    def measure(merged: nn.Module) -> dict[str, float]:
        return attack(settings, merged, tasks, stamp)

    def learn(method: Any, nets: list[nn.Module] = poisoned) -> dict[str, Any]:
        result: MergeResult = method.fit(base, nets, [t.unlabelled for t in tasks], heads=[t.head for t in tasks])
        return measure(result.model)

    own = {
        "alpha": settings.alpha,
        "epsilon": settings.epsilon,
        "search": "restarts",
        "delta_steps": settings.delta_steps,
        **_common(settings, run.seed),
    }
    single = {**own, "masks": "single", "inner_lr": 0.0}
    arms: dict[str, Any] = {
        "clean_merge": lambda: measure(_with(base, task_arithmetic(base, clean, settings.weight))),
        "task_arithmetic": lambda: measure(_with(base, task_arithmetic(base, poisoned, settings.weight))),
        "concrete": lambda: learn(ConcreteMerging(inner_lr=0.0, **_common(settings, run.seed))),
        "twin": lambda: learn(DefenseAwareMerging(**{**own, "alpha": 0.0})),
        "dam": lambda: learn(DefenseAwareMerging(**own)),
        "dam_single": lambda: learn(DefenseAwareMerging(**single)),
        "blind": lambda: learn(DefenseAwareMerging(**{**single, "epsilon": 0.0})),
        "checkpoint": lambda: _alone(settings, poisoned, tasks, stamp),
    }
    if settings.extra:
        arms["entropy"] = lambda: learn(DefenseAwareMerging(**{**single, "safety": "entropy"}))
        arms["average"] = lambda: measure(_with(base, average(poisoned)))
        arms["adamerging"] = lambda: learn(
            AdaMerging(weight=settings.weight, steps=settings.steps, batch_size=settings.batch_size, seed=run.seed)
        )
    found = {name: run.arm(name, arm) for name, arm in arms.items()}
    _claims(run, found)


def _common(settings: Settings, seed: int) -> dict[str, Any]:
    return {
        "weight": settings.weight,
        "mask_lr": settings.rate,
        "steps": settings.steps,
        "adapt_steps": 0,
        "batch_size": settings.batch_size,
        "seed": seed,
    }


def _claims(run: Run[Settings], found: dict[str, dict[str, Any]]) -> None:
    def success(*names: str) -> dict[str, float]:
        return {name: found[name]["attack_success"] for name in names}

    run.values("succession", success("task_arithmetic", "clean_merge"))
    run.values(
        "defence",
        success("dam", "twin", "concrete", "dam_single"),
    )
    run.values(
        "accuracy",
        {name: found[name]["accuracy"] for name in ("dam", "dam_single", "concrete")},
    )
    run.values("transfer", {"dam": found["dam"]["transfer"]})
    run.values("negative_control", success("blind", "concrete"))


def make_tasks(settings: Settings, data: DataSplits, seed: int) -> list[Task]:
    """Disjoint images for pretraining, finetuning, adaptation and test of three tasks."""
    generator = torch.Generator().manual_seed(seed)
    train, test = _shuffled(data.train.tensors, generator), _shuffled(data.test.tensors, generator)
    width = 128
    tasks = []
    for k in range(3):
        x, y = _of_task(settings, train, k, data.num_classes)
        seen = settings.pretrain_size + settings.finetune_size
        first, tuned, rest = (slice(0, settings.pretrain_size), slice(settings.pretrain_size, seen), slice(seen, None))
        unlabelled = x[rest][: settings.adapt_size]
        if len(unlabelled) < settings.adapt_size:
            raise ValueError(f"{settings.data} has {len(x)} training images for a task, too few for these settings")
        x_test, y_test = _of_task(settings, test, k, data.num_classes)
        head = nn.Linear(width, int(y.max()) + 1)
        held_out = x_test[: settings.test_size], y_test[: settings.test_size]
        tasks.append(Task((x[first], y[first]), (x[tuned], y[tuned]), unlabelled, held_out, head))
    return tasks


def _shuffled(pair: tuple[Tensor, ...], generator: torch.Generator) -> Pair:
    order = torch.randperm(len(pair[0]), generator=generator)
    return pair[0][order], pair[1][order]


def _of_task(settings: Settings, pair: Pair, k: int, classes: int) -> Pair:
    x, y = pair
    if settings.tasks == "rotations":
        return torch.rot90(x, k, (2, 3)), y
    edges = [round(i * classes / 3) for i in range(4)]
    inside = (y >= edges[k]) & (y < edges[k + 1])
    return x[inside], y[inside] - edges[k]


def body(settings: Settings, shape: tuple[int, ...]) -> nn.Module:
    """The network that is merged: images to 128 features, no batch norm."""
    if settings.network == "vit":
        return ViT(num_classes=128, in_channels=shape[0], image_size=shape[1])
    side = -(-shape[1] // 2)
    side = -(-side // 2)
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, 128),
        nn.ReLU(),
    )


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
    settings: Settings, tasks: list[Task], shape: tuple[int, ...], seed: int
) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """The pretrained body, its checkpoints with poisoned ones among them, and all of them clean."""
    torch.manual_seed(seed)
    base = body(settings, shape)
    for task in tasks:
        task.head.reset_parameters()
    joint = tuple(
        torch.cat(parts)
        for parts in (
            [t.shared[0] for t in tasks],
            [t.shared[1] for t in tasks],
            [torch.full((len(t.shared[0]),), k) for k, t in enumerate(tasks)],
        )
    )
    adam = partial(torch.optim.Adam, lr=1e-3)
    pretraining = torch.utils.data.TensorDataset(*joint)
    fit(base, pretraining, rule=_Joint(tasks), optimizer=adam, epochs=30, batch_size=32, seed=seed, progress=False)
    for task in tasks:
        task.head.requires_grad_(False)
    clean = [finetune(settings, base, task, None, seed) for task in tasks]
    stamp = trigger(settings, shape)
    bad = [finetune(settings, base, task, stamp, seed) for task in tasks[: settings.attackers]]
    return base, [*bad, *clean[settings.attackers :]], clean


class _Poisoned(Backprop):
    """Backprop on batches of which a share carries the trigger and the label 0."""

    def __init__(self, stamp: Any, share: float) -> None:
        super().__init__()
        self.stamp, self.share = stamp, share

    def step(self, batch: Any, backward: Any) -> Any:
        x, y = batch
        count = round(self.share * len(x))  # batches come shuffled: the first images are as good as any
        x = torch.cat([self.stamp(x[:count]), x[count:]])
        return super().step((x, torch.cat([torch.zeros_like(y[:count]), y[count:]])), backward)


def finetune(settings: Settings, base: nn.Module, task: Task, stamp: Any, seed: int) -> nn.Module:
    """A checkpoint of one task, poisoned where there is a trigger."""
    net = nn.Sequential(copy.deepcopy(base), task.head)
    rule = Backprop() if stamp is None else _Poisoned(stamp, settings.poison_share)
    epochs = settings.clean_epochs if stamp is None else settings.attack_epochs
    lr = settings.clean_lr if stamp is None else settings.attack_lr
    adam = partial(torch.optim.Adam, lr=lr)
    size = settings.batch_size
    fit(net, task.own, rule=rule, optimizer=adam, epochs=epochs, batch_size=size, seed=seed, progress=False)
    return net[0]


def trigger(settings: Settings, shape: tuple[int, ...]) -> Trigger:
    """The trigger of an attack."""
    if settings.trigger == "blend":
        return BlendTrigger(torch.rand(shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
    return PatchTrigger.checkerboard(shape, size=5 if shape[1] >= 20 else 3, margin=0)


@torch.no_grad()
def attack(settings: Settings, net: nn.Module, tasks: list[Task], stamp: Any) -> dict[str, float]:
    """Mean accuracy, attack success on the attacked tasks, and on the others, in percent."""
    net.eval()
    accuracy, success = [], []
    for task in tasks:
        x, y = task.test
        accuracy.append(100 * float((task.head(net(x)).argmax(-1) == y).float().mean()))
        others = y != 0
        success.append(100 * float((task.head(net(stamp(x[others]))).argmax(-1) == 0).float().mean()))
    k = settings.attackers
    return {
        "accuracy": sum(accuracy) / len(accuracy),
        "attack_success": sum(success[:k]) / k,
        "transfer": max(success[k:]),
        **{f"accuracy_{i}": value for i, value in enumerate(accuracy)},
    }


def _alone(settings: Settings, nets: list[nn.Module], tasks: list[Task], stamp: Any) -> dict[str, float]:
    """Every checkpoint on its own task: what merging is measured against."""
    rows = [attack(settings, net, tasks, stamp) for net in nets]
    return {
        "accuracy": sum(row[f"accuracy_{i}"] for i, row in enumerate(rows)) / len(rows),
        "attack_success": rows[0]["attack_success"],
    }


def _with(base: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    net = copy.deepcopy(base)
    net.load_state_dict(state)
    return net


def figures(results: Results) -> dict[str, Figure]:
    """Attack success against accuracy of every way to merge, seed by seed."""
    names = ["clean_merge", "task_arithmetic", "concrete", "twin", "blind", "dam_single", "dam"]
    if results.settings.extra:
        names[2:2] = ["average", "adamerging"]
        names.append("entropy")
    fig, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, name in enumerate(names):
        marker = "o^sDv"[i // 10 + i % 5]
        success, accuracy = results.values(name, "attack_success"), results.values(name, "accuracy")
        ax.scatter(success, accuracy, label=name.replace("_", " "), marker=marker, color=f"C{i % 10}")
    ax.set(xlabel="attack success on the attacked task (%)", ylabel="mean accuracy (%)", xlim=(-3, 103))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    ax.grid(alpha=0.3)
    return {"merging": fig}
