"""Measures guidance of networks that overfit or do not train, by trained, untrained and wrongly paired guides.

The main task is a wide perceptron on small images with a residual network as guide. The weight of the alignment is
chosen on the validation images, by the loss under an untrained guide. At full scale deeper targets follow, and two
sequence tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import FitResult, evaluate, fit
from torchfolio.engine.recipes import adam, cosine
from torchfolio.experiments._guidance_sequences import TASKS, learn_sequences
from torchfolio.models import MLP, VGG, ResNetCIFAR
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.runs.tasks import Images, accuracy, load
from torchfolio.training.guidance import Guidance, GuidedRule


@dataclass(frozen=True)
class Settings(Images):
    """Data, of which the validation images choose the weight, networks and budget."""

    train_size: int | None = 4000
    hidden: tuple[int, ...] = setting((512, 512, 512), "widths of the target's hidden layers")
    guide_widths: tuple[int, ...] = setting((8, 16, 32), "channels of the guide's three stages")
    epochs: int = setting(10, "passes over the training images")
    batch_size: int = setting(256, "images in a batch; CKA depends on it")
    lr: float = setting(1e-3, "learning rate of the target's Adam")
    guide_epochs: int = setting(8, "number of epochs of training the guide")
    guide_lr: float = setting(3e-3, "learning rate of the guide's Adam, at the start of a cosine decay")
    guide_batch_size: int = setting(64, "images in a batch of the guide's training")
    alphas: tuple[float, ...] = setting((3.0, 10.0, 30.0), "weights of the alignment to choose from")
    early_steps: int = setting(100, "steps of guidance as initialisation")
    deep: bool = setting(
        False, "whether to train, too, a deep perceptron and a deep convolutional network without skip connections"
    )
    deep_layers: int = setting(48, "hidden layers of the deep perceptron")
    stage_layers: int = setting(12, "convolutions in each of the three stages of the network without skip connections")
    sequence_examples: int = setting(0, "training examples of the sequence tasks; 0 leaves them out")
    sequence_epochs: int = setting(20, "passes over them")
    lengths: tuple[int, int] = setting((5, 12), "shortest and longest sequence")


SCALES = {
    "smoke": Settings(
        data="digits", train_size=512, val_size=100, test_size=None, image_size=None, hidden=(64, 64), batch_size=64,
        guide_widths=(4, 8, 16), epochs=3, guide_epochs=2, alphas=(1.0, 10.0), early_steps=10, deep=True,
        deep_layers=8, stage_layers=2, sequence_examples=128, sequence_epochs=1,
    ),
    "quick": Settings(),
    "full": Settings(
        train_size=20_000, val_size=2000, test_size=None, image_size=None, deep=True, sequence_examples=20_000
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train the target plainly and under every guide."""
    settings, data = run.settings, load(run)
    guided = partial(_learn, run, data, wide, "untrained")
    plain = run.arm("plain", _learn, run, data, wide, "plain")
    tried = {alpha: run.arm(f"alpha_{alpha:g}", guided, alpha=alpha) for alpha in settings.alphas}
    alpha = min(tried, key=lambda a: tried[a]["val_loss"])
    arms = {
        "plain": plain,
        "untrained": run.arm("untrained", lambda: {**tried[alpha], "alpha": alpha}),
        "trained": run.arm("trained", _learn, run, data, wide, "trained", alpha=alpha),
        "early": run.arm("early", guided, alpha=alpha, steps=settings.early_steps),
        "permuted": run.arm("permuted", guided, alpha=alpha, guide_input=_shuffled(run.seed)),
    }
    score = {name: arm["accuracy"] for name, arm in arms.items()}
    loss = {f"{name}_loss": arm["loss"] for name, arm in arms.items()}
    run.values(
        "overfitting", _some(score, "trained", "plain"), **_some(loss, "trained_loss", "untrained_loss", "plain_loss")
    )
    run.values("untrained_guide", _some(score, "untrained", "plain"), **_some(loss, "untrained_loss", "plain_loss"))
    run.values("early_guidance", _some(loss, "early_loss", "plain_loss"))
    run.values("negative_control", _some(score, "permuted", "plain"), **_some(loss, "permuted_loss", "untrained_loss"))
    if settings.deep:  # too deep to train well by themselves
        for id, make in {"deep_perceptron": deep_perceptron, "no_skips": no_skips}.items():
            learn = partial(_learn, run, data, make, alpha=alpha, reduction="mean")
            run.values(id, {kind: run.arm(f"{id}_{kind}", learn, kind)["accuracy"] for kind in KINDS})
    if settings.sequence_examples:
        cases = [(task, kind) for task in TASKS for kind in KINDS]
        values = {f"{t}_{k}": run.arm(f"{t}_{k}", learn_sequences, run, t, k)["accuracy"] for t, k in cases}
        run.values("sequences", values)


KINDS = ("plain", "untrained", "trained")
"""Ways to train a target: without a guide, by an untrained and by a trained one."""


def _some(values: dict[str, float], *names: str) -> dict[str, float]:
    return {name: values[name] for name in names}


def wide(run: Run[Settings], data: DataSplits) -> nn.Module:
    """The target that overfits: a wide perceptron."""
    return MLP(data.train.tensors[0][0].numel(), data.num_classes, run.settings.hidden, norm="batch")


def deep_perceptron(run: Run[Settings], data: DataSplits) -> nn.Module:
    """A perceptron of many layers."""
    hidden = (256,) * run.settings.deep_layers
    return MLP(data.train.tensors[0][0].numel(), data.num_classes, hidden, norm="batch", dropout=0.1)


def no_skips(run: Run[Settings], data: DataSplits) -> nn.Module:
    """Convolutional layers in three stages without a skip connection."""
    return VGG(
        tuple((w,) * run.settings.stage_layers for w in run.settings.guide_widths), data.num_classes, data.shape[0]
    )


def residual(run: Run[Settings], data: DataSplits) -> nn.Module:
    """The guide: a small residual network."""
    return ResNetCIFAR(8, run.settings.guide_widths, data.num_classes, data.shape[0], shortcut="B")


# Its stem, the convolutions of its three blocks, its pooled features; not the shortcuts.
GUIDE_LAYERS = ("stem.0", *(f"block{k}.conv{c}" for k in (1, 2, 3) for c in (1, 2)), "head.0")


def _shuffled(seed: int) -> Callable[[Tensor], Tensor]:
    """The same examples in another order, drawn anew for every batch: a guide that looks at the wrong ones."""
    draws = torch.Generator().manual_seed(seed)
    return lambda x: x[torch.randperm(len(x), generator=draws).to(x.device)]


def _learn(
    run: Run[Settings],
    data: DataSplits,
    make: Callable[..., nn.Module],
    kind: str,
    *,
    alpha: float = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Train a target in one of the ways of `KINDS`; scores, and what is left of the alignment of every pair."""
    settings = run.settings
    net = make(run, data)  # first, so that every arm starts from the same weights
    rule, outcome = None, {}
    if kind != "plain":
        guide = residual(run, data)
        if kind == "trained":
            own = {"epochs": settings.guide_epochs, "batch_size": settings.guide_batch_size, "scheduler": cosine()}
            _fit(run, data, guide, settings.guide_lr, **own)
            outcome["guide_accuracy"] = accuracy(guide, data.test)
        rule = GuidedRule(Guidance(net, guide, layers=GUIDE_LAYERS, alpha=alpha, **options))
    result = _fit(run, data, net, settings.lr, rule=rule, epochs=settings.epochs, batch_size=settings.batch_size)
    test, val = evaluate(net, data.test), evaluate(net, data.val)
    outcome |= {
        "accuracy": 100 * test["accuracy"],
        "loss": test["loss"],
        "val_accuracy": 100 * val["accuracy"],
        "val_loss": val["loss"],
        "train_accuracy": accuracy(net, data.train),
        "val_losses": result.history.to_frame()["val_loss"].tolist(),
    }
    if rule is not None:
        outcome["alignment"] = [value.item() for value in rule.guidance.per_layer.values()]
    return outcome


def _fit(run: Run[Settings], data: DataSplits, net: nn.Module, lr: float, **options: Any) -> FitResult:
    own = {"val": data.val, "optimizer": adam(lr), "drop_last": True, "seed": run.seed, "device": run.device}
    return fit(net, data.train, **own, **options)


def figures(results: Results) -> plots.Figures:
    """Validation loss through training, final accuracy, and the choice of the weight."""
    arms = {
        "plain": "plain",
        "untrained guide": "untrained",
        "trained guide": "trained",
        "untrained guide, early steps": "early",
        "guide sees other images": "permuted",
    }
    alphas = sorted(results.settings.alphas)
    made = {
        "overfitting": plots.curves(results, {label: (arm, "val_losses") for label, arm in arms.items()},
                                    xlabel="epoch", ylabel="validation loss (nats)"),
        "accuracy": plots.bars(results, {label: (arm, "accuracy") for label, arm in arms.items()},
                               ylabel="test accuracy (%)"),
        "weight": plots.curves(results, {"untrained guide": [(f"alpha_{a:g}", "val_loss") for a in alphas]}, x=alphas,
                               levels={"plain": ("plain", "val_loss")}, logx=True, xlabel="weight α of the alignment",
                               ylabel="validation loss (nats)"),
    }  # fmt: skip
    deeper = {"deep targets": ("deep_perceptron", "no_skips")} if results.settings.deep else {}
    sequences = {"sequences": tuple(TASKS)} if results.settings.sequence_examples else {}
    for title, names in {**deeper, **sequences}.items():
        series = {kind: {name.replace("_", " "): (f"{name}_{kind}", "accuracy") for name in names} for kind in KINDS}
        made[title] = plots.groups(results, series, ylabel="test accuracy (%)")
    return made
