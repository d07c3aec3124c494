"""Measures masks from a policy: whether the policy learns, and whether the classifier gains, on digits beside photographs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from torchfolio.data import CropFlip
from torchfolio.engine import Backprop, LearningRule, fit
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._digits_and_photographs import Part, load_joint, modality
from torchfolio.experiments._policy_alone import GRID, ShuffledRewards, train_alone
from torchfolio.measure import linear_probe, outputs
from torchfolio.models import ConvNet
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.training.noise_mask import BetaMaskPolicy, NoiseMaskPretraining, Reinforce, average_checkpoints
from torchfolio.training.snapshots import Snapshots


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


def classifier(s: Settings) -> nn.Module:
    """Three convolutions; 20 outputs whichever classes are trained on."""
    return ConvNet(20, 1, (s.width, 2 * s.width, 4 * s.width))


def policy(s: Settings) -> BetaMaskPolicy:
    """The light network beside it."""
    w = s.policy_width
    return BetaMaskPolicy(ConvNet(4 * w, 1, (w, 2 * w, 4 * w)), 4 * w, s.grid)


def fixed_policy(s: Settings) -> BetaMaskPolicy:
    """Beta(1.6, 1.6) in every cell, whatever the image."""
    constant = policy(s)
    constant.mix = constant.ema = 1.0
    constant.base.fill_(1.6).log_()
    return constant


def masked(s: Settings, **options: Any) -> NoiseMaskPretraining:
    """The method with the blur of small images."""
    return NoiseMaskPretraining(**{"policy": policy(s), "kernel": 3, "sigma": 1.0, **options})


RULES: dict[str, Callable[[Settings], LearningRule | None]] = {
    "conventional": lambda s: None,
    "two_phase": lambda s: Backprop(),
    "lse": lambda s: masked(s, objective="lse"),
    "reinforce": masked,
    "random": lambda s: masked(s, policy=fixed_policy(s)),
}


def train(run: Run[Settings], parts: dict[str, Part], name: str, lr: float) -> tuple[nn.Module, nn.Module, Any]:
    """One arm at one rate: the network before and after fine-tuning, and its rule. All arms take equally many epochs."""
    s = run.settings
    net, rule = classifier(s), RULES[name](s)  # the classifier first, so that all arms start from the same weights
    own = {"augment": CropFlip(2, flip=False), "batch_size": 64, "drop_last": True, "device": run.device}
    steps = len(parts["train"][0]) // 64
    recipe = partial(sgd, momentum=0.9, weight_decay=1e-4, nesterov=False)
    first = s.pretrain_epochs + (s.finetune_epochs if rule is None else 0)
    factory = rule.optimizer(recipe(lr)) if isinstance(rule, NoiseMaskPretraining) else recipe(lr)
    snapshots = Snapshots(3)
    fit(net, parts["train"], rule=rule, optimizer=factory, scheduler=cosine(), epochs=first, seed=run.seed,
        callbacks=[snapshots], **own)  # fmt: skip
    if rule is None:
        return net, net, rule
    if isinstance(rule, NoiseMaskPretraining):
        net.load_state_dict(average_checkpoints(snapshots.states))
    heated = copy.deepcopy(net)
    fit(net, parts["train"], optimizer=recipe(0.3 * lr), scheduler=cosine(warmup=steps), epochs=s.finetune_epochs,
        seed=run.seed + 1000, **own)  # fmt: skip
    return heated, net, rule


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
    found = {"lr": lr, "val": best, "before": score(heated, parts["test"]), "after": score(net, parts["test"])}
    if name == "reinforce":
        calls = []
        handle = rule.policy.register_forward_hook(lambda *_: calls.append(1))
        score(net, parts["test"])
        handle.remove()
        found |= {"policy_calls": len(calls), "modality": modality(rule.policy, parts)}
        found["modality_untrained"] = modality(policy(run.settings), parts)
        found["masks"] = rule.masks(torch.cat([parts["test"][0][:4], parts["test"][0][-4:]]).to(run.device))
    return found


def unseen(run: Run[Settings], parts: dict[str, Part], name: str, lr: float) -> dict[str, float]:
    """Train on classes 0 to 4 of both sets; probes of the pooled features on few labels of the others."""
    halves = {split: [part[1] % 10 < 5, part[1] % 10 >= 5] for split, part in parts.items()}
    old, new = ({k: (x[halves[k][i]], y[halves[k][i]]) for k, (x, y) in parts.items()} for i in (0, 1))
    _, net, _ = train(run, old, name, lr)
    body = nn.Sequential(*list(net.children())[:-1], *list(net.get_submodule("head").children())[:-1])
    features = {k: outputs(body, x) for k, (x, _) in new.items()}
    found = {}
    for shots in run.settings.shots:
        rows = torch.cat([(new["train"][1] == c).nonzero()[:shots, 0] for c in new["train"][1].unique()])
        found[f"shots_{shots}"] = 100 * linear_probe(
            features["train"][rows], new["train"][1][rows], features["test"], new["test"][1], max_iter=1000
        )
    return found


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
    names = ("reinforce", "conventional")
    run.values("harmless", {name: after[name] for name in names}, policy_calls=ours["policy_calls"])
    run.values("fine_tuning", before=ours["before"], after=ours["after"])
    held = {n: run.arm(f"unseen_{n}", unseen, run, parts, n, arms[n]["lr"]) for n in UNSEEN}
    sizes = dict(zip(("few", "many"), s.shots, strict=True))
    probed = {f"{n}_{size}": held[n][f"shots_{shots}"] for size, shots in sizes.items() for n in UNSEEN}
    run.values("unseen_concepts", probed)


UNSEEN = ("conventional", "random", "lse", "reinforce")
"""Ways to train that are compared on classes they were not trained on."""


def figures(results: Results) -> plots.Figures:
    """Accuracy of all arms, and what the masks look like."""
    masks = results.values("reinforce", "masks")[0]
    return {
        "accuracy": plots.bars(results, {n: (n, "after") for n in RULES}, ylabel="balanced test accuracy (%)"),
        "masks": plots.grid(masks, ["digit"] * 4 + ["photograph"] * 4),
    }
