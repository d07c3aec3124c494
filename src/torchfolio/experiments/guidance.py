"""Measures guidance of networks that overfit or do not train, by trained, untrained and wrongly paired guides.

The main task is a wide perceptron on small images with a residual network as guide. The weight of the alignment is
chosen on the validation images, by the loss under an untrained guide. Longer than most because at full scale deeper
targets follow, and two sequence tasks, each with arms of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from torchfolio.data import DataSplits
from torchfolio.engine import Backprop, FitResult, evaluate, fit
from torchfolio.experiments._guidance_peers import peers
from torchfolio.experiments._guidance_sequences import (
    PAD,
    SYMBOLS,
    AttentionNet,
    RecurrentNet,
    copying,
    parity,
    token_accuracy,
    token_loss,
)
from torchfolio.models import MLP, VGG, ResNetCIFAR
from torchfolio.runs import Results, Run
from torchfolio.training.guidance import Guidance, GuidedRule

MakeNet = Callable[[DataSplits], nn.Module]

__all__ = ["SCALES", "Settings", "figures", "peers", "run"]


@dataclass(frozen=True)
class Settings:
    """Data, networks and budget.

    Attributes:
        data: name of the data set.
        train_size: training images.
        val_size: images held out of the training part, which choose the weight.
        test_size: test images; `None` takes all.
        image_size: images are box-downsampled to this side; `None` keeps them.
        hidden: widths of the target's hidden layers.
        guide_widths: channels of the guide's three stages.
        epochs: passes over the training images.
        batch_size: images in a batch; CKA depends on it.
        lr: of the target's Adam.
        guide_epochs: of training the guide.
        guide_lr: of the guide's Adam, at the start of a cosine decay.
        guide_batch_size: images in a batch of the guide's training.
        alphas: weights of the alignment to choose from.
        early_steps: steps of guidance as initialisation.
        deep: also train a deep perceptron and a deep convolutional network without skip connections.
        deep_layers: hidden layers of the deep perceptron.
        stage_layers: convolutions in each of the three stages of the network without skip connections.
        sequence_examples: training examples of the sequence tasks; 0 leaves them out.
        sequence_epochs: passes over them.
        lengths: shortest and longest sequence.
    """

    data: str = "cifar10"
    train_size: int = 4000
    val_size: int = 1000
    test_size: int | None = 2000
    image_size: int | None = 16
    hidden: tuple[int, ...] = (512, 512, 512)
    guide_widths: tuple[int, ...] = (8, 16, 32)
    epochs: int = 10
    batch_size: int = 256
    lr: float = 1e-3
    guide_epochs: int = 8
    guide_lr: float = 3e-3
    guide_batch_size: int = 64
    alphas: tuple[float, ...] = (3.0, 10.0, 30.0)
    early_steps: int = 100
    deep: bool = False
    deep_layers: int = 48
    stage_layers: int = 12
    sequence_examples: int = 0
    sequence_epochs: int = 20
    lengths: tuple[int, int] = (5, 12)


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
    settings = run.settings
    data = run.data(
        settings.data, train_size=settings.train_size, val=settings.val_size, test_size=settings.test_size,
        image_size=settings.image_size,
    )  # fmt: skip
    guided = partial(_guided, run, data, wide)
    plain = run.arm("plain", _plain, run, data, wide)
    tried = {alpha: run.arm(f"alpha_{alpha:g}", guided, alpha=alpha) for alpha in settings.alphas}
    alpha = min(tried, key=lambda a: tried[a]["val_loss"])
    untrained = run.arm("untrained", lambda: {**tried[alpha], "alpha": alpha})
    trained = run.arm("trained", guided, alpha=alpha, trained=True)
    early = run.arm("early", guided, alpha=alpha, steps=settings.early_steps)
    permuted = run.arm("permuted", guided, alpha=alpha, guide_input=_shuffled)
    run.values(
        "overfitting",
        {
            "trained": trained["accuracy"],
            "plain": plain["accuracy"],
            "trained_loss": trained["loss"],
            "untrained_loss": untrained["loss"],
            "plain_loss": plain["loss"],
        },
    )
    run.values(
        "untrained_guide",
        {
            "untrained": untrained["accuracy"],
            "plain": plain["accuracy"],
            "untrained_loss": untrained["loss"],
            "plain_loss": plain["loss"],
        },
    )
    run.values("early_guidance", {"early_loss": early["loss"], "plain_loss": plain["loss"]})
    run.values(
        "negative_control",
        {
            "permuted": permuted["accuracy"],
            "plain": plain["accuracy"],
            "permuted_loss": permuted["loss"],
            "untrained_loss": untrained["loss"],
        },
    )
    if settings.deep:
        _deep(run, data, alpha)
    if settings.sequence_examples:
        _sequences(run)


# Networks


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


def _shuffled(x: Tensor) -> Tensor:
    """The same examples in another order: a guide that looks at the wrong ones."""
    return x[torch.randperm(len(x), device=x.device)]


# Arms


def _plain(run: Run[Settings], data: DataSplits, make: Callable[..., nn.Module]) -> dict[str, Any]:
    net = make(run, data)
    return _train(run, data, net, None)


def _guided(
    run: Run[Settings],
    data: DataSplits,
    make: Callable[..., nn.Module],
    *,
    alpha: float,
    trained: bool = False,
    **options: Any,
) -> dict[str, Any]:
    net = make(run, data)  # first, so that every arm starts from the same weights
    guide = residual(run, data)
    if trained:
        _train_guide(run, data, guide)
    rule = GuidedRule(Guidance(net, guide, layers=GUIDE_LAYERS, alpha=alpha, **options))
    outcome = _train(run, data, net, rule)
    if trained:
        outcome["guide_accuracy"] = 100 * evaluate(guide, data.test)["accuracy"]
    return outcome


def _train(run: Run[Settings], data: DataSplits, net: nn.Module, rule: GuidedRule | None) -> dict[str, Any]:
    settings = run.settings
    result = _fit(run, data, net, rule, settings.epochs, settings.lr, settings.batch_size)
    history = result.history.to_frame()
    test, val = evaluate(net, data.test), evaluate(net, data.val)
    outcome: dict[str, Any] = {
        "accuracy": 100 * test["accuracy"],
        "loss": test["loss"],
        "val_accuracy": 100 * val["accuracy"],
        "val_loss": val["loss"],
        "train_accuracy": 100 * evaluate(net, data.train)["accuracy"],
        "val_losses": history["val_loss"].tolist(),
    }
    if rule is not None:
        outcome["alignment"] = [value.item() for value in rule.guidance.per_layer.values()]
    return outcome


def _fit(
    run: Run[Settings],
    data: DataSplits,
    net: nn.Module,
    rule: GuidedRule | None,
    epochs: int,
    lr: float,
    batch_size: int,
    **options: Any,
) -> FitResult:
    return fit(
        net, data.train, val=data.val, rule=rule, optimizer=partial(Adam, lr=lr), epochs=epochs,
        batch_size=batch_size, drop_last=True, seed=run.seed, device=run.device, **options,
    )  # fmt: skip


def _train_guide(run: Run[Settings], data: DataSplits, guide: nn.Module) -> None:
    settings = run.settings
    steps = settings.guide_epochs * (len(data.train) // settings.guide_batch_size)
    _fit(
        run, data, guide, None, settings.guide_epochs, settings.guide_lr, settings.guide_batch_size,
        scheduler=partial(CosineAnnealingLR, T_max=steps),
    )  # fmt: skip


def _deep(run: Run[Settings], data: DataSplits, alpha: float) -> None:
    """Targets that are too deep to train well by themselves, by untrained and trained guides."""
    for id, make in {"deep_perceptron": deep_perceptron, "no_skips": no_skips}.items():
        measured = {
            "plain": run.arm(f"{id}_plain", _plain, run, data, make)["accuracy"],
            "untrained": run.arm(f"{id}_untrained", _guided, run, data, make, alpha=alpha, reduction="mean")[
                "accuracy"
            ],
            "trained": run.arm(f"{id}_trained", _guided, run, data, make, alpha=alpha, trained=True, reduction="mean")[
                "accuracy"
            ],
        }
        run.values(id, measured)


def _sequences(run: Run[Settings]) -> None:
    """Copying by a recurrent network under a transformer, parity by a transformer under a recurrent network."""
    tasks = {
        "copying": (copying, SYMBOLS + 3, SYMBOLS + 3, RecurrentNet, AttentionNet),
        "parity": (parity, PAD + 1, 2, AttentionNet, RecurrentNet),
    }
    measured = {}
    for name, (task, tokens, outputs, target, guide) in tasks.items():
        nets = partial(target, tokens, outputs, name == "parity"), partial(guide, tokens, outputs, name == "parity")
        for kind in ("plain", "untrained", "trained"):
            arm = run.arm(f"{name}_{kind}", _sequence, run, task, *nets, kind)
            measured[f"{name}_{kind}"] = arm["accuracy"]
    run.values(
        "sequences",
        measured,
    )


def _sequence(
    run: Run[Settings],
    task: Callable[..., tuple[Tensor, Tensor]],
    make: Callable[[], nn.Module],
    make_guide: Callable[[], nn.Module],
    kind: str,
) -> dict[str, float]:
    settings = run.settings
    generator = torch.Generator().manual_seed(run.seed)
    train = task(settings.sequence_examples, *settings.lengths, generator)
    test = task(2000, *settings.lengths, generator)
    net, guide = make(), make_guide()

    def learn(model: nn.Module, rule: Any) -> float:
        fit(model, train, rule=rule, optimizer=partial(Adam, lr=settings.lr), epochs=settings.sequence_epochs,
            batch_size=settings.batch_size, drop_last=True, seed=run.seed, device=run.device, clip_norm=1.0)  # fmt: skip
        return token_accuracy(model, *(t.to(run.device) for t in test))

    task_rule = Backprop(token_loss)
    outcome = {"guide_accuracy": learn(guide, task_rule)} if kind == "trained" else {}
    rule = GuidedRule(Guidance(net, guide, reduction="mean"), task_rule) if kind != "plain" else task_rule
    return {"accuracy": learn(net, rule), **outcome}


# Figures


ARMS = {"plain": "plain", "untrained": "untrained guide", "trained": "trained guide", "early": "untrained guide, early steps", "permuted": "guide sees other images"}  # fmt: skip


def figures(results: Results) -> dict[str, Figure]:
    """Validation loss through training, final accuracy, and the choice of the weight."""
    made = {"overfitting": _curves(results), "weight": _weights(results)}
    if results.settings.deep:
        made["deep targets"] = _bars(results, ("deep_perceptron", "no_skips"))
    if results.settings.sequence_examples:
        made["sequences"] = _bars(results, ("copying", "parity"))
    return made


def _curves(results: Results) -> Figure:
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for k, arm in enumerate(ARMS):  # the bars' labels name the colours of both
        curves = results.values(arm, "val_losses")
        epochs = range(1, curves.shape[1] + 1)
        left.plot(epochs, curves.mean(0), color=f"C{k}", marker=".")
        left.fill_between(epochs, curves.min(0), curves.max(0), color=f"C{k}", alpha=0.15)
        accuracy = results.values(arm, "accuracy")
        right.barh(k, accuracy.mean(), xerr=accuracy.std(), color=f"C{k}", capsize=3)
    left.set(xlabel="epoch", ylabel="validation loss (nats)")
    left.grid(alpha=0.3)
    right.set(xlabel="test accuracy (%)", yticks=range(len(ARMS)), yticklabels=list(ARMS.values()))
    right.invert_yaxis()
    return fig


def _weights(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
    alphas = sorted(results.settings.alphas)
    losses = [results.values(f"alpha_{alpha:g}", "val_loss") for alpha in alphas]
    ax.errorbar(alphas, [v.mean() for v in losses], yerr=[v.std() for v in losses], marker="o", capsize=3)
    ax.axhline(results.values("plain", "val_loss").mean(), ls="--", c="grey", label="plain")
    ax.set(xscale="log", xlabel="weight α of the alignment", ylabel="validation loss (nats)")
    ax.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    ax.set_xticks([], minor=True)
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def _bars(results: Results, names: tuple[str, ...]) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for k, kind in enumerate(("plain", "untrained", "trained")):
        values = [results.values(f"{name}_{kind}", "accuracy") for name in names]
        places = [at + 0.27 * (k - 1) for at in range(len(names))]
        ax.bar(places, [v.mean() for v in values], 0.25, yerr=[v.std() for v in values], capsize=3, label=ARMS[kind])
    ax.set(ylabel="test accuracy (%)", xticks=range(len(names)), xticklabels=[n.replace("_", " ") for n in names])
    ax.legend()
    return fig
