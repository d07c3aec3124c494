"""BaDExpert on several attacks: is the expert a backdoor without a task, and which inputs does it give away?"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchfolio.backdoor import poison, poisoned_test
from torchfolio.backdoor.badexpert import SCORES, BaDExpert, suspicion
from torchfolio.backdoor.evaluation import evaluate_input_detector
from torchfolio.backdoor.metrics import accuracy_of, attack_metrics, auroc, labels_of
from torchfolio.backdoor.zoo import SmallConvNet, fit_classifier
from torchfolio.data import CropFlip, DataSplits
from torchfolio.engine import StepRecorder, fit
from torchfolio.experiments._backdoors import Pair, attack, divide, victim
from torchfolio.measure import outputs
from torchfolio.runs import Results, Run
from torchfolio.runs.tasks import OwnNetwork


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, attacks and the two finetunings.

    Attributes:
        data: name of the images.
        attacks: by name, see `torchfolio.experiments._backdoors.attack`.
        network: `"conv"` or `"resnet18"`.
        width: of the network.
        epochs: of the victims.
        lr: of the victims.
        rate: share of the training images that is poisoned.
        clean_size: trusted images, from the test part; they are not reported on.
        unlearn_lr: of the expert; `"auto"` finds one on the trusted images.
        unlearn_batch: of the expert.
        finetune_lr: of the auxiliary network.
        finetune_batch: of the auxiliary network; 350 images in batches of 16 are as many steps as the authors take, 1,400
            in batches of 64.
        kappa: of the score.
        batch_size: of the victims; with 128, as in the authors' code, digits reach an accuracy of 0.96 in four epochs.
        flip: train victims and finetune on flipped images too. The auxiliary network always sees random crops.
        traced: images of each kind behind the curve of unlearning.
    """

    data: str = "mnist10k"
    attacks: tuple[str, ...] = ("badnets", "blend", "all_to_all")
    network: str = "conv"
    width: int = 8
    epochs: int = 4
    lr: float = 0.05
    rate: float = 0.1
    clean_size: int = 500
    unlearn_lr: float | str = "auto"
    unlearn_batch: int = 32
    finetune_lr: float = 0.05
    finetune_batch: int = 16
    kappa: float = 0.5
    batch_size: int = 128
    flip: bool = False
    traced: int = 500


SCALES = {
    "smoke": Settings(data="digits", attacks=("badnets", "blend"), epochs=6, lr=0.1, clean_size=120, traced=100),
    "quick": Settings(),
    "full": Settings(
        data="cifar10", attacks=("badnets", "blend", "warp", "sinusoid"), network="resnet18", width=64, epochs=100,
        lr=0.1, clean_size=2000, unlearn_lr=1e-4, unlearn_batch=128, finetune_lr=0.1, finetune_batch=64, batch_size=128,
        flip=True,
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train a victim of every attack and a clean network, fit the detector, and try it on triggered images."""
    settings = run.settings
    data = run.data(settings.data, normalize=False, val=0)
    trusted, test = divide(data.test.tensors, settings.clean_size, run.seed)
    found = {name: run.arm(name, lambda name=name: judged(run, data, trusted, test, name)) for name in settings.attacks}
    found["clean"] = run.arm("clean", lambda: judged(run, data, trusted, test, "badnets", rate=0.0))
    badnets, blend = found["badnets"], found["blend"]
    run.values(
        "expert", {"accuracy": badnets["expert_acc"], "attack_success": badnets["expert_asr"],
                   "never_poisoned": found["clean"]["asr"]},
    )  # fmt: skip
    run.values(
        "detection",
        {"badnets": badnets["auroc_triangle"], "blend": blend["auroc_triangle"], "badnets_tpr": badnets["tpr"],
         "badnets_fpr": badnets["fpr"]},
    )  # fmt: skip
    run.values(
        "ensemble",
        {"ensemble": badnets["auroc_triangle"], "auxiliary": badnets["auroc_auxiliary"]},
    )
    run.values(
        "filtering",
        {"filtered": badnets["filtered_asr"], "unfiltered": badnets["asr"], "accuracy": badnets["filtered_acc"],
         "unfiltered_accuracy": badnets["acc"]},
    )  # fmt: skip
    run.values(
        "negative_control", {"right_labels": badnets["auroc_control"], "own_confidence": badnets["auroc_network"]}
    )


def judged(
    run: Run[Settings], data: DataSplits, trusted: Pair, test: Pair, name: str, rate: float | None = None
) -> dict[str, Any]:
    """One victim and its detector; with a rate of 0, a network that was never poisoned."""
    settings = run.settings
    trigger, labels = attack(name, data)
    poisoned = poison(
        data.train.tensors,
        trigger,
        labels,
        rate=settings.rate if rate is None else rate,
        seed=run.seed,  # pyright: ignore[reportArgumentType]
    )
    flip = CropFlip(padding=0) if settings.flip else None
    net = victim(data, settings.model or settings.network, settings.width, run.seed)
    fit_classifier(
        net, poisoned, settings.epochs, settings.lr, augment=flip, batch_size=settings.batch_size, seed=run.seed,
        device=run.device,
    )  # fmt: skip
    attacked = poisoned_test(test, trigger, labels)
    started = time.perf_counter()
    detector = fitted(run, net, trusted)
    seconds = time.perf_counter() - started
    before = attack_metrics(net, test, attacked)
    expert = attack_metrics(detector.expert_, test, attacked)
    report = evaluate_input_detector(detector, net, test, attacked)
    triggered, target = attacked.tensors()
    (b, m, said), (b_bad, m_bad, said_bad) = detector.confidences(test[0]), detector.confidences(triggered)
    right, reached = said == test[1], said_bad == target
    aurocs = {
        f"auroc_{score}": auroc(
            suspicion(b[right], m[right], score, settings.kappa),
            suspicion(b_bad[reached], m_bad[reached], score, settings.kappa),
        )
        for score in SCORES
    }
    started = time.perf_counter()
    detector.score(test[0][:1000])
    scoring = (time.perf_counter() - started) / min(1.0, len(test[0]) / 1000)
    found = {
        **before.as_dict(), "expert_acc": expert.acc, "expert_asr": expert.asr, **aurocs, "tpr": report.tpr_held_out,
        "fpr": report.fpr_held_out, "filtered_asr": report.filter.filtered_asr, "filtered_acc": report.filter.psr,
        "auroc_strip": auroc(strip(net, test[0][right], trusted[0]), strip(net, triggered[reached], trusted[0])),
        "threshold": detector.threshold_, "stopped_at": detector.history_[-1][0], "unlearn_lr": detector.unlearn_lr_, "fit_seconds": seconds,
        "score_seconds_per_1000": scoring,
        "points": np.stack([np.r_[b[right][:400], b_bad[reached][:400]], np.r_[m[right][:400], m_bad[reached][:400]]]).tolist(),
        "clean_points": int(min(400, right.sum())),
    }  # fmt: skip
    if name == "badnets" and rate is None:
        found |= control(run, net, trusted, test, attacked, detector)
        found |= trace(run, net, trusted, test, attacked, detector.unlearn_lr_)
    return found


def fitted(run: Run[Settings], net: nn.Module, trusted: Pair, **changes: Any) -> BaDExpert:
    """The detector of the experiment."""
    settings = run.settings
    flips = CropFlip(mode="constant") if settings.flip else None
    chosen: dict[str, Any] = {
        "kappa": settings.kappa, "unlearn_lr": settings.unlearn_lr, "unlearn_batch": settings.unlearn_batch,
        "finetune_lr": settings.finetune_lr, "finetune_batch": settings.finetune_batch, "seed": run.seed,
        "augment": flips or "auto", "unlearn_augment": flips, **changes,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said in numbers below
        return BaDExpert(**chosen).fit(net, trusted)


def control(
    run: Run[Settings], net: nn.Module, trusted: Pair, test: Pair, attacked: Any, expert: BaDExpert
) -> dict[str, float]:
    """As many steps at the same rate on right labels, and none: confidence of those networks in the label as a score.

    A network is surer of its trigger than of most clean inputs, and gentle finetuning on clean examples widens that whatever
    their labels are, so a high AUROC here says that this score owes little to the forgetting.
    """
    finetuned = copy.deepcopy(net)
    fit(
        finetuned, trusted, optimizer=partial(torch.optim.Adam, lr=expert.unlearn_lr_), max_steps=expert.history_[-1][0],
        batch_size=run.settings.unlearn_batch, seed=run.seed, device=str(run.device), progress=False,
    )  # fmt: skip
    triggered, target = attacked.tensors()
    said, said_bad = labels_of(net, test[0]), labels_of(net, triggered)
    clean, bad = (
        (test[0][said == test[1]], said[said == test[1]]),
        (triggered[said_bad == target], target[said_bad == target]),
    )

    def confidence(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        if not len(x):  # no attack that succeeds, and an AUROC of NaN
            return torch.zeros(0)
        return outputs(model, x).double().softmax(1).gather(1, labels[:, None])[:, 0]

    return {f"auroc_{name}": auroc(confidence(model, *clean), confidence(model, *bad))
            for name, model in (("control", finetuned), ("network", net))}  # fmt: skip


def trace(
    run: Run[Settings], net: nn.Module, trusted: Pair, test: Pair, attacked: Any, lr: float
) -> dict[str, list[float]]:
    """Accuracy and attack success of the expert, step by step, without a stop."""
    settings = run.settings
    x, y = (t[: settings.traced] for t in test)
    bad, target = (t[: settings.traced] for t in attacked.tensors())
    trace = StepRecorder(
        {
            "acc": lambda state: accuracy_of(state.model, x, y),
            "asr": lambda state: accuracy_of(state.model, bad, target),
        },
        every=1,
    )
    wrong = (trusted[1] + 1) % int(outputs(net, x[:1]).shape[1])
    fit(
        copy.deepcopy(net), (trusted[0], wrong), optimizer=partial(torch.optim.Adam, lr=lr), epochs=2,
        batch_size=settings.unlearn_batch, callbacks=[trace], seed=run.seed, device=str(run.device), progress=False,
    )  # fmt: skip
    return {f"trace_{name}": [row[name] for row in trace.rows] for name in ("acc", "asr")}


def strip(net: nn.Module, x: Tensor, clean: Tensor, blends: int = 16) -> Tensor:
    """The baseline: predictions of triggered images survive being blended with others, so their entropy is low.

    Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019.
    """
    total = torch.zeros(len(x), dtype=torch.float64)
    for other in clean[:blends] if len(x) else ():  # there may be no attack that succeeds
        p = outputs(net, 0.5 * (x + other)).double().softmax(1)
        total += -(p * p.clamp_min(1e-12).log()).sum(1)
    return -total / blends


def figures(results: Results) -> dict[str, Figure]:
    """The plane of the two confidences, how well every score ranks, and the course of unlearning."""
    return {"confidences": _plane(results), "auroc": _aurocs(results), "unlearning": _unlearning(results)}


def _plane(results: Results) -> Figure:
    settings = results.settings
    names = settings.attacks
    fig, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.8), layout="constrained", squeeze=False, sharey=True
    )
    for ax, name in zip(axes[0], names, strict=True):
        first = results.arms[0][name]  # the first seed's; seeds differ in how many attacks succeed
        points, clean = np.asarray(first["points"]), int(first["clean_points"])
        ax.scatter(*points[:, :clean], s=8, alpha=0.5, label="clean")
        ax.scatter(*points[:, clean:], s=8, alpha=0.5, marker="x", label="triggered")
        _rays(ax, -float(first["threshold"]), settings.kappa)
        ax.set(
            xlabel="$b$, confidence of the expert", title=name.replace("_", " "), xlim=(-0.03, 1.03), ylim=(-0.03, 1.03)
        )
    axes[0, 0].set_ylabel("$m$, confidence of the auxiliary network")
    axes[0, -1].legend(loc="center left", framealpha=0.9)
    return fig


def _rays(ax: Axes, a: float, kappa: float) -> None:
    """Where the score equals the threshold: rejected is what lies below the one ray or right of the other."""
    m = np.linspace(0, 1, 101)
    if a > 0:
        ax.plot(m, np.minimum(a * kappa * m, 2), "k-", lw=1, label="threshold")
    below = m[m <= kappa]
    ax.plot(1 - a * (kappa - below), below, "k--", lw=1)


def _aurocs(results: Results) -> Figure:
    names = results.settings.attacks
    shown = [*SCORES, "strip"]
    fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        values = np.stack([results.values(name, f"auroc_{score}") for score in shown], 1)
        place = np.arange(len(shown)) + (k - (len(names) - 1) / 2) * width
        ax.bar(place, values.mean(0), width, yerr=values.std(0), label=name.replace("_", " "), capsize=2)
    ax.axhline(0.5, c="grey", ls=":")
    ax.set_xticks(range(len(shown)), [*SCORES, "STRIP"])
    ax.set(ylabel="AUROC", ylim=(0, 1.02))
    ax.legend(loc="lower left", ncols=len(names), framealpha=0.9)
    return fig


def _unlearning(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for value, label in (("trace_acc", "accuracy on clean images"), ("trace_asr", "attack success")):
        curves = results.values("badnets", value)
        ax.plot(np.arange(curves.shape[1]), curves.mean(0), label=label)
        ax.fill_between(np.arange(curves.shape[1]), curves.min(0), curves.max(0), alpha=0.2)
    for k, step in enumerate(results.values("badnets", "stopped_at")):
        ax.axvline(step, c="k", ls=":", lw=1, label="unlearning stopped" if k == 0 else None)
    ax.set(xlabel="step on wrong labels", ylabel="share", ylim=(0, 1.02))
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def peers(bench: Any) -> None:
    """Scores of many inputs, against the same three networks and the formula input by input, as the authors' code does."""
    torch.manual_seed(0)
    net, x = SmallConvNet(1, 10, width=8).eval(), torch.rand(2000, 1, 28, 28)
    y = labels_of(net, x)
    y[:8] = torch.arange(8)  # a random network says little else than one class
    settings: dict[str, Any] = {"unlearn_lr": 1e-5, "stop_acc": 0.0, "finetune_epochs": 1, "fpr": 0.05}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        detector = BaDExpert(**settings, unlearn_epochs=1).fit(net, (x[:500], y[:500]))

    def one_by_one() -> list[float]:
        b, m, _ = detector.confidences(x)
        return [
            -min(2 * v / max(u, 1e-8), (1 - u) / max(0.5 - v, 1e-8))
            for u, v in zip(b.tolist(), m.tolist(), strict=True)
        ]

    bench.compare("score 2,000 inputs of 28 x 28", ours=lambda: detector.score(x), one_by_one=one_by_one)
