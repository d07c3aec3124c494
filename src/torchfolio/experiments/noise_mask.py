"""Measures masks from a policy: does the policy learn, and does the classifier gain, on digits beside photographs?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from torchfolio.experiments._digits_and_photographs import Part, load_joint, modality
from torchfolio.experiments._mask_training import RULES, masked, policy, train
from torchfolio.experiments._policy_alone import GRID, ShuffledRewards, train_alone
from torchfolio.measure import linear_probe, outputs
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.training.noise_mask import Reinforce


@dataclass(frozen=True)
class Settings:
    """Data, networks and budget."""

    sources: tuple[str, ...] = setting(
        ("mnist10k", "cifar10"), "data sets put into one problem, the photographs in grey"
    )
    train_sizes: tuple[int, ...] = setting((2000, 3000), "training images of each")
    val_size: int = setting(500, "validation images of each, which choose the learning rate")
    test_sizes: tuple[int, ...] = setting((1000, 2000), "test images of each")
    image_size: int = setting(16, "side of all images")
    width: int = setting(8, "channels of the classifier's first layer")
    policy_width: int = setting(3, "width of the policy's network")
    grid: int = setting(8, "side of the mask's grid")
    pretrain_epochs: int = setting(5, "passes under masks")
    finetune_epochs: int = setting(4, "passes without them")
    lrs: tuple[float, ...] = setting((0.03, 0.1, 0.3), "learning rates to choose from; fine-tuning takes 0.3 of them")
    steps: int = setting(300, "number of steps of REINFORCE on a frozen classifier")
    shots: tuple[int, ...] = setting((20, 100), "labels for each unseen class")


SCALES = {
    "smoke": Settings(
        sources=("digits", "digits"), train_sizes=(200, 200), val_size=100, test_sizes=(100, 100), image_size=8,
        width=4, pretrain_epochs=2, finetune_epochs=1, lrs=(0.1,), steps=20, shots=(5, 10),
    ),
    "quick": Settings(),
    "full": Settings(
        train_sizes=(6000, 14_000), test_sizes=(2000, 10_000), val_size=1000, image_size=32, width=16, policy_width=8,
        grid=9, pretrain_epochs=60, finetune_epochs=15, steps=1000,
    ),
}  # fmt: skip


UNSEEN = ("conventional", "random", "lse", "reinforce")
"""Ways to train that are compared on classes they were not trained on."""


def score(net: nn.Module, part: Part) -> float:
    """Balanced accuracy in percent."""
    return 100 * float(balanced_accuracy_score(part[1].numpy(), outputs(net, part[0]).argmax(1).numpy()))


def arm(run: Run[Settings], parts: dict[str, Part], name: str) -> dict[str, Any]:
    """One method at the rate that is best on validation data."""
    tried = []
    for lr in run.settings.lrs:
        torch.manual_seed(run.seed)  # every rate from the same weights
        heated, net, rule = train(run, parts, name, lr)
        tried.append((score(net, parts["val"]), lr, heated, net, rule))
    best, lr, heated, net, rule = max(tried, key=lambda t: t[0])
    result = {"lr": lr, "val": best, "before": score(heated, parts["test"]), "after": score(net, parts["test"])}
    return {**result, **of_policy(run, parts, net, rule)} if name == "reinforce" else result


def of_policy(run: Run[Settings], parts: dict[str, Part], net: nn.Module, rule: Any) -> dict[str, Any]:
    """Whether deployment calls the policy, what it knows of the images, and masks of some."""
    calls: list[int] = []
    handle = rule.policy.register_forward_hook(lambda *_: calls.append(1))
    score(net, parts["test"])
    handle.remove()
    images = torch.cat([parts["test"][0][:4], parts["test"][0][-4:]])
    return {
        "policy_calls": len(calls), "modality": modality(rule.policy, parts),
        "modality_untrained": modality(policy(run.settings), parts), "masks": rule.masks(images.to(run.device)),
    }  # fmt: skip


def unseen(run: Run[Settings], parts: dict[str, Part], name: str, lr: float) -> dict[str, float]:
    """Train on classes 0 to 4 of both sets; probes of the pooled features on few labels of the others."""
    early = {split: y % 10 < 5 for split, (_, y) in parts.items()}
    _, net, _ = train(run, {split: (x[early[split]], y[early[split]]) for split, (x, y) in parts.items()}, name, lr)
    body = nn.Sequential(*list(net.children())[:-1], *list(net.get_submodule("head").children())[:-1])
    late = [(outputs(body, parts[k][0][~early[k]]), parts[k][1][~early[k]]) for k in ("train", "test")]
    (features, labels), test = late
    accuracies = {}
    for shots in run.settings.shots:
        rows = torch.cat([(labels == c).nonzero()[:shots, 0] for c in labels.unique()])
        accuracies[f"shots_{shots}"] = 100 * linear_probe(features[rows], labels[rows], *test, max_iter=1000)
    return accuracies


def run(run: Run[Settings]) -> None:
    """Mechanism first, then every arm at its best rate, then classes that were not trained on."""
    s, parts = run.settings, load_joint(run)

    def alone(objective: Reinforce) -> dict[str, Any]:
        few = replace(s, grid=GRID)
        return train_alone(parts["train"], parts["val"], lambda: masked(few, objective=objective), steps=s.steps,
                           seed=run.seed, device=run.device)  # fmt: skip

    learned = run.arm("policy_alone", alone, Reinforce())
    shuffled = run.arm("shuffled_rewards", alone, ShuffledRewards(run.seed))
    run.values("policy_learns", difference=learned["difference"], fall=1 - learned["after"] / learned["before"])
    run.values("negative_control", difference=shuffled["difference"])
    arms = {name: run.arm(name, arm, run, parts, name) for name in RULES}
    after = {name: values["after"] for name, values in arms.items()}
    ours = arms["reinforce"]
    run.values("image_conditional", accuracy=ours["modality"], untrained=ours["modality_untrained"])
    run.values("accuracy", after)
    run.values("harmless", pick(after, "reinforce", "conventional"), policy_calls=ours["policy_calls"])
    run.values("fine_tuning", pick(ours, "before", "after"))
    held = {n: run.arm(f"unseen_{n}", unseen, run, parts, n, arms[n]["lr"]) for n in UNSEEN}
    sizes = dict(zip(("few", "many"), s.shots, strict=True))
    probed = {f"{n}_{size}": held[n][f"shots_{shots}"] for size, shots in sizes.items() for n in UNSEEN}
    run.values("unseen_concepts", probed)


def figures(results: Results) -> plots.Figures:
    """Accuracy of all arms, and what the masks look like."""
    masks = results.values("reinforce", "masks")[0]
    return {
        "accuracy": plots.bars(results, {n: (n, "after") for n in RULES}, ylabel="balanced test accuracy (%)"),
        "masks": plots.grid(masks, ["digit"] * 4 + ["photograph"] * 4),
    }
