"""Measures DAM: does a merged network inherit a checkpoint's backdoor, and do the learned masks close it?

Masks and coefficients are learned on unlabelled images that neither training nor test has.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.adaptation.dam import ConcreteMerging, DefenseAwareMerging
from torchfolio.adaptation.merging import AdaMerging, MergeResult, average, task_arithmetic
from torchfolio.backdoor import Trigger
from torchfolio.experiments._multitask_checkpoints import Attack, Task, checkpoints, make_tasks, trigger
from torchfolio.runs import Results, Run, plots, setting


@dataclass(frozen=True)
class Settings(Attack):
    """Tasks and attack, and merging."""

    weight: float = setting(0.7, "coefficient of every task vector")
    steps: int = setting(120, "number of steps of mask training")
    alpha: float = setting(0.05, "weight of safety")
    rate: float = setting(2e-2, "learning rate of the masks")
    epsilon: float = setting(
        0.3, "bound of the perturbations. A patch of a strength below 0.3 flips hardly any prediction"
    )
    delta_steps: int = setting(4, "steps of the search for perturbations, which starts anew at every step of the masks")
    extra: bool = setting(True, "whether the entropy form of safety, plain averages and AdaMerging are measured too")


SCALES = {
    "smoke": Settings(
        data="digits", finetune_size=600, adapt_size=200, test_size=300, steps=10, attack_epochs=2, clean_epochs=1,
        extra=False,
    ),
    "quick": Settings(),
    "full": Settings(
        data="cifar10", tasks="groups", network="vit", pretrain_size=3000, finetune_size=8000, attackers=2,
        trigger="blend", attack_epochs=12, clean_epochs=8,
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train the checkpoints, merge them in every way, then attack what came out."""
    settings = run.settings
    data = run.data(settings.data, normalize=False, val=0)
    tasks = make_tasks(settings, data, run.seed)
    base, poisoned, clean = checkpoints(settings, tasks, data.shape, run.seed)
    stamp = trigger(settings, data.shape)

    def measure(merged: nn.Module) -> dict[str, float]:
        return attack(settings, merged, tasks, stamp)

    def learn(method: Any) -> dict[str, float]:
        result: MergeResult = method.fit(base, poisoned, [t.unlabelled for t in tasks], heads=[t.head for t in tasks])
        return measure(result.model)

    common = {
        "weight": settings.weight, "mask_lr": settings.rate, "steps": settings.steps, "adapt_steps": 0,
        "batch_size": settings.batch_size, "seed": run.seed,
    }  # fmt: skip
    own = {**common, "alpha": settings.alpha, "epsilon": settings.epsilon, "search": "restarts",
           "delta_steps": settings.delta_steps}  # fmt: skip
    single = {**own, "masks": "single", "inner_lr": 0.0}
    arms: dict[str, Any] = {
        "clean_merge": lambda: measure(_with(base, task_arithmetic(base, clean, settings.weight))),
        "task_arithmetic": lambda: measure(_with(base, task_arithmetic(base, poisoned, settings.weight))),
        "concrete": lambda: learn(ConcreteMerging(inner_lr=0.0, **common)),
        "twin": lambda: learn(DefenseAwareMerging(**{**own, "alpha": 0.0})),
        "dam": lambda: learn(DefenseAwareMerging(**own)),
        "dam_single": lambda: learn(DefenseAwareMerging(**single)),
        "blind": lambda: learn(DefenseAwareMerging(**{**single, "epsilon": 0.0})),
        "checkpoint": lambda: _alone(settings, poisoned, tasks, stamp),
    }
    if settings.extra:
        adamerging = AdaMerging(
            weight=settings.weight, steps=settings.steps, batch_size=settings.batch_size, seed=run.seed
        )
        arms["entropy"] = lambda: learn(DefenseAwareMerging(**{**single, "safety": "entropy"}))
        arms["average"] = lambda: measure(_with(base, average(poisoned)))
        arms["adamerging"] = lambda: learn(adamerging)
    found = {name: run.arm(name, arm) for name, arm in arms.items()}

    def values(id: str, key: str, *names: str) -> None:
        run.values(id, {name: found[name][key] for name in names})

    values("succession", "attack_success", "task_arithmetic", "clean_merge")
    values("defence", "attack_success", "dam", "twin", "concrete", "dam_single")
    values("accuracy", "accuracy", "dam", "dam_single", "concrete")
    values("transfer", "transfer", "dam")
    values("negative_control", "attack_success", "blind", "concrete")


@torch.no_grad()
def attack(settings: Attack, net: nn.Module, tasks: list[Task], stamp: Trigger) -> dict[str, float]:
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


def _alone(settings: Attack, nets: list[nn.Module], tasks: list[Task], stamp: Trigger) -> dict[str, float]:
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


def figures(results: Results) -> plots.Figures:
    """Attack success against accuracy of every way to merge, seed by seed."""
    names = ["clean_merge", "task_arithmetic", "concrete", "twin", "blind", "dam_single", "dam"]
    if results.settings.extra:
        names[2:2] = ["average", "adamerging"]
        names.append("entropy")
    points = {name.replace("_", " "): ((name, "attack_success"), (name, "accuracy")) for name in names}
    return {
        "merging": plots.scatter(
            results, points, xlabel="attack success on the attacked task (%)", ylabel="mean accuracy (%)"
        )
    }
