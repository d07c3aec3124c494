"""BaDExpert on several attacks: is the expert a backdoor without a task, and which inputs does it give away?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchfolio.backdoor import poison, poisoned_test
from torchfolio.backdoor.badexpert import SCORES, BaDExpert
from torchfolio.backdoor.evaluation import evaluate_input_detector
from torchfolio.backdoor.metrics import attack_metrics
from torchfolio.backdoor.zoo import fit_classifier
from torchfolio.data import CropFlip, DataSplits
from torchfolio.experiments._backdoors import Pair, attack, divide, victim
from torchfolio.experiments._confidence_plane import confidence_plane
from torchfolio.experiments._expert_controls import step_by_step, without_forgetting
from torchfolio.experiments._suspicion_scores import side_by_side
from torchfolio.measure import timed
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.runs.tasks import OwnNetwork


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, attacks and the two finetunings."""

    data: str = setting("mnist10k", "name of the images")
    attacks: tuple[str, ...] = setting(
        ("badnets", "blend", "all_to_all"), "names of attacks, see `torchfolio.experiments._backdoors.attack`"
    )
    network: str = setting("conv", '`"conv"` or `"resnet18"`')
    width: int = setting(8, "width of the network")
    epochs: int = setting(4, "number of epochs of the victims")
    lr: float = setting(0.05, "learning rate of the victims")
    rate: float = setting(0.1, "share of the training images that is poisoned")
    clean_size: int = setting(500, "trusted images, from the test part; they are not reported on")
    unlearn_lr: float | str = setting("auto", 'learning rate of the expert; `"auto"` finds one on the trusted images')
    unlearn_batch: int = setting(32, "batch size of the expert")
    finetune_lr: float = setting(0.05, "learning rate of the auxiliary network")
    finetune_batch: int = setting(
        16,
        "batch size of the auxiliary network; 350 images by 16 give as many steps as the authors' 1,400 by 64",
    )
    kappa: float = setting(0.5, "slope of the score")
    batch_size: int = setting(
        128,
        "batch size of the victims; with 128, as in the authors' code, digits reach an accuracy of 0.96 in four epochs",
    )
    flip: bool = setting(
        False,
        "whether to train victims and finetune on flipped images too. The auxiliary network always sees random crops",
    )
    traced: int = setting(500, "images of each kind behind the curve of unlearning")


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
    data = run.data(run.settings.data, normalize=False, val=0)
    trusted, test = divide(data.test.tensors, run.settings.clean_size, run.seed)
    arms = {name: run.arm(name, judged, run, data, trusted, test, name) for name in run.settings.attacks}
    clean = run.arm("clean", judged, run, data, trusted, test, "badnets", rate=0.0)
    badnets, blend = arms["badnets"], arms["blend"]
    expert = {"accuracy": badnets["expert_acc"], "attack_success": badnets["expert_asr"]}
    run.values("expert", expert, never_poisoned=clean["asr"])
    aurocs = {"badnets": badnets["auroc_triangle"], "blend": blend["auroc_triangle"]}
    run.values("detection", aurocs, badnets_tpr=badnets["tpr"], badnets_fpr=badnets["fpr"])
    run.values("ensemble", ensemble=badnets["auroc_triangle"], auxiliary=badnets["auroc_auxiliary"])
    filtered = {"filtered": badnets["filtered_asr"], "accuracy": badnets["filtered_acc"]}
    run.values("filtering", filtered, unfiltered=badnets["asr"], unfiltered_accuracy=badnets["acc"])
    run.values("negative_control", right_labels=badnets["auroc_control"], own_confidence=badnets["auroc_network"])


def judged(
    run: Run[Settings], data: DataSplits, trusted: Pair, test: Pair, name: str, rate: float | None = None
) -> dict[str, Any]:
    """One victim and its detector; with a rate of 0, a network that was never poisoned."""
    settings, (trigger, labels) = run.settings, attack(name, data)
    images: Any = data.train.tensors
    poisoned = poison(images, trigger, labels, rate=settings.rate if rate is None else rate, seed=run.seed)
    net = victim(data, settings.model or settings.network, settings.width, run.seed)
    fit_classifier(
        net, poisoned, settings.epochs, settings.lr, augment=CropFlip(padding=0) if settings.flip else None,
        batch_size=settings.batch_size, seed=run.seed, device=run.device,
    )  # fmt: skip
    attacked = poisoned_test(test, trigger, labels)
    detector, seconds = timed(fitted, run, net, trusted)
    _, scoring = timed(detector.score, test[0][:1000])
    own, expert = (attack_metrics(model, test, attacked) for model in (net, detector.expert_))
    report = evaluate_input_detector(detector, net, test, attacked)
    result = {
        **own.as_dict(), "expert_acc": expert.acc, "expert_asr": expert.asr, "tpr": report.tpr_held_out,
        "fpr": report.fpr_held_out, "filtered_asr": report.filter.filtered_asr, "filtered_acc": report.filter.psr,
        "threshold": detector.threshold_, "stopped_at": detector.history_[-1][0], "unlearn_lr": detector.unlearn_lr_,
        "fit_seconds": seconds, "score_seconds_per_1000": scoring * 1000 / min(1000, len(test[0])),
        **side_by_side(detector, test, attacked, trusted[0]),
    }  # fmt: skip
    if name == "badnets" and rate is None:
        result |= without_forgetting(run, net, trusted, test, attacked, detector)
        result |= step_by_step(run, net, trusted, test, attacked, detector.unlearn_lr_)
    return result


def fitted(run: Run[Settings], net: nn.Module, trusted: Pair) -> BaDExpert:
    """The detector of the experiment."""
    settings: Any = run.settings
    flips = CropFlip(mode="constant") if settings.flip else None
    detector = BaDExpert(
        kappa=settings.kappa, unlearn_lr=settings.unlearn_lr, unlearn_batch=settings.unlearn_batch,
        finetune_lr=settings.finetune_lr, finetune_batch=settings.finetune_batch, augment=flips or "auto",
        unlearn_augment=flips, seed=run.seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it warns of is measured
        return detector.fit(net, trusted)


def figures(results: Results) -> plots.Figures:
    """The plane of the two confidences, how well every score ranks, and the course of unlearning."""
    scores = {score: f"auroc_{score}" for score in SCORES} | {"STRIP": "auroc_strip"}
    series = {name: {k: (name, value) for k, value in scores.items()} for name in results.settings.attacks}
    course = {"accuracy on clean images": ("badnets", "trace_acc"), "attack success": ("badnets", "trace_asr")}
    steps = range(results.values("badnets", "trace_acc").shape[1])
    unlearning = plots.curves(results, course, x=steps, xlabel="step on wrong labels", ylabel="share")
    for step in results.values("badnets", "stopped_at"):
        unlearning.axes[0].axvline(step, c="k", ls=":", lw=1)  # where unlearning stopped
    return {
        "confidences": confidence_plane(results),
        "auroc": plots.groups(results, series, ylabel="AUROC"),
        "unlearning": unlearning,
    }
