"""NAB against undefended training and other uses of the same isolated samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.backdoor import AllToOne, PatchTrigger, PoisonedDataset, poison, poisoned_test
from torchfolio.backdoor.evaluation import evaluate_defense
from torchfolio.backdoor.metrics import accuracy_of, attack_metrics
from torchfolio.backdoor.nab import (
    NAB,
    LGAIsolator,
    NABDataset,
    PrecomputedIsolator,
    PrecomputedRelabeler,
    Stamp,
    VerifiedDataRelabeler,
)
from torchfolio.backdoor.zoo import Cutout, fit_classifier
from torchfolio.data import CropFlip, DataSplits
from torchfolio.engine import Backprop, fit
from torchfolio.engine.loader import as_batches
from torchfolio.engine.state import FitState
from torchfolio.experiments._backdoors import attack, divide, victim
from torchfolio.runs import Results, Run


@dataclass(frozen=True)
class Task:
    """One data set, its attack and the settings of the defence on it.

    Attributes:
        data: name of the images.
        attack: by name, see `torchfolio.experiments._backdoors.attack`.
        train_size: training images; `None` takes all.
        test_size: test images, of which `clean_size` are verified and not reported on; `None` takes all.
        clean_size: verified images.
        network: `"conv"` or `"resnet18"`.
        width: of the network.
        epochs: of the final training.
        lr: of the final training.
        isolation_epochs: of each training of the isolator.
        isolation_lr: of the isolator.
        restarts: trainings of the isolator.
        looks: its measurements an epoch.
        verified_epochs: of the classifier of verified images.
        verified_lr: of it.
        stamp: value of the stamp, or `"mean"`.
        flip: train on flipped images too.
    """

    data: str = "mnist10k"
    attack: str = "badnets"
    train_size: int | None = None
    test_size: int | None = None
    clean_size: int = 400
    network: str = "conv"
    width: int = 8
    epochs: int = 12
    lr: float = 0.05
    isolation_epochs: int = 2
    isolation_lr: float = 0.05
    restarts: int = 4
    looks: int = 4
    verified_epochs: int = 100
    verified_lr: float = 0.1
    stamp: float | str = 0.5
    flip: bool = False


@dataclass(frozen=True)
class Settings:
    """Tasks and what they share.

    Attributes:
        digits: task on digits.
        photos: task on photographs; `None` leaves it out.
        rate: share of the training images that is poisoned.
        ratio: share that is isolated.
        stamp_clean_fraction: share of the other samples that one arm stamps too.
        batch_size: of all trainings but the verified classifier's.
        unlearn_lr: of the baseline that unlearns the isolated samples.
    """

    digits: Task = Task()
    photos: Task | None = Task(
        data="cifar10", train_size=10_000, test_size=3000, clean_size=1000, width=16, epochs=8, lr=0.05, isolation_epochs=4,
        restarts=2, looks=2, stamp="mean", flip=True,
    )  # fmt: skip
    rate: float = 0.1
    ratio: float = 0.05
    stamp_clean_fraction: float = 0.02
    batch_size: int = 64
    unlearn_lr: float = 1e-3


SCALES = {
    "smoke": Settings(
        digits=Task(data="digits", clean_size=120, epochs=3, isolation_epochs=1, isolation_lr=0.1, restarts=2, looks=2, verified_epochs=5),
        photos=None,
    ),
    "quick": Settings(),
    "full": Settings(
        digits=Task(epochs=30),
        photos=Task(
            data="cifar10", clean_size=2500, network="resnet18", width=64, epochs=100, lr=0.1, isolation_epochs=20,
            isolation_lr=0.1, restarts=1, looks=1, verified_epochs=100, verified_lr=0.01, stamp="mean", flip=True,
        ),
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Isolate once, then train with every use of what was isolated."""
    settings = run.settings
    digits = Scene(run, settings.digits)
    found = {"isolation": run.arm("isolation", lambda: digits.isolate(settings.digits.isolation_epochs))}
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "clean": lambda: digits.undefended(rate=0.0),
        "undefended": digits.undefended,
        "nab": lambda: digits.defended(found["isolation"]),
        "nab_stamped": lambda: digits.defended(found["isolation"], fraction=settings.stamp_clean_fraction),
        "relabel": lambda: digits.relabelled(found["isolation"]),
        "remove": lambda: digits.removed(found["isolation"]),
        "unlearn": lambda: digits.unlearned(found["isolation"]),
    }
    found |= {name: run.arm(name, arm) for name, arm in arms.items()}
    if settings.photos is not None:
        scene = Scene(run, settings.photos)
        isolated = run.arm("photos_isolation", lambda: scene.isolate(settings.photos.isolation_epochs))  # pyright: ignore[reportOptionalMemberAccess]
        found["photos_undefended"] = run.arm("photos_undefended", scene.undefended)
        found["photos_nab"] = run.arm("photos_nab", lambda: scene.defended(isolated))
    _claims(run, found)


def _claims(run: Run[Settings], found: dict[str, dict[str, Any]]) -> None:
    nab, undefended, relabel = found["nab"], found["undefended"], found["relabel"]
    run.values("isolation", {"precision": found["isolation"]["precision"]})
    run.values(
        "defense",
        {"attack_success": nab["asr"], "true_class": nab["bacc"], "undefended": undefended["asr"],
         "never_poisoned": found["clean"]["asr"]},
    )  # fmt: skip
    variants = {"digits_stamped": (found["nab_stamped"], undefended)}
    if "photos_nab" in found:
        variants["photos"] = (found["photos_nab"], found["photos_undefended"])
    values = {}
    for name, (after, before) in variants.items():
        values |= {f"{name}_accuracy_loss": before["acc"] - after["acc"], f"{name}_attack_success": after["asr"]}
    run.values("clean_accuracy", {**values, "digits_plain_accuracy_loss": undefended["acc"] - nab["acc"]})
    run.values(
        "mechanism",
        {"without_stamp": nab["asr_without_stamp"], "rejected_triggered": nab["b_rej"], "rejected_clean": nab["c_rej"]},
    )
    run.values(
        "negative_control",
        {
            "relabel": relabel["asr"],
            "nab": nab["asr"],
            "relabel_true_class": relabel["bacc"],
            "nab_true_class": nab["bacc"],
        },
    )


class Scene:
    """A poisoned training set, verified images, a test set, and trainings on them."""

    def __init__(self, run: Run[Settings], task: Task) -> None:
        self.run, self.task = run, task
        self.data: DataSplits = run.data(
            task.data, normalize=False, val=0, train_size=task.train_size, test_size=task.test_size
        )
        self.clean, self.test = divide(self.data.test.tensors, task.clean_size, run.seed)
        self.trigger, self.labels = attack(task.attack, self.data)
        self.poisoned = self._poison(run.settings.rate)
        self.attacked = poisoned_test(self.test, self.trigger, self.labels)
        self.augment = CropFlip(padding=0) if task.flip else None

    def _poison(self, rate: float) -> PoisonedDataset:
        return poison(self.data.train.tensors, self.trigger, self.labels, rate=rate, seed=self.run.seed)  # pyright: ignore[reportArgumentType]

    def network(self) -> nn.Module:
        return victim(self.data, self.task.network, self.task.width, self.run.seed)

    def varied(self, x: Tensor) -> Tensor:
        """Batches of verified images, cropped, flipped and cut as in the authors' code (4 pixels of 32)."""
        return Cutout(3)(CropFlip(padding=x.shape[-1] // 8, flip=self.task.flip)(x))

    def another(self) -> nn.Module:
        """A network of its own at every call, by torch's global generator."""
        return victim(self.data, self.task.network, self.task.width, int(torch.randint(2**31, ())))

    def stamp(self) -> Stamp:
        return Stamp(value=self.task.stamp)  # pyright: ignore[reportArgumentType]

    def isolate(self, epochs: int) -> dict[str, Any]:
        """Which samples are isolated and how they are relabelled, once for all arms."""
        task, settings = self.task, self.run.settings
        isolator = LGAIsolator(
            self.another, epochs=epochs, lr=task.isolation_lr, looks=task.looks, restarts=task.restarts,
            batch_size=settings.batch_size, ratio=settings.ratio, device=self.run.device,
        )  # fmt: skip
        relabeler = VerifiedDataRelabeler(
            model_fn=self.network, epochs=task.verified_epochs, lr=task.verified_lr, batch_size=32, augment=self.varied,
            device=self.run.device,
        )  # fmt: skip
        nab = NAB(isolator, relabeler, self.stamp(), settings.ratio)
        started = time.perf_counter()
        made = nab.prepare(self.poisoned.tensors(), clean=self.clean, seed=self.run.seed)
        report = made.report(self.poisoned.is_poison, self.poisoned.y_true)
        order = made.scores.argsort(descending=True)  # pyright: ignore[reportOptionalMemberAccess]
        bad = torch.from_numpy(self.poisoned.is_poison)[order].double()
        shares = np.linspace(0.01, 0.2, 20)
        curve = [float(bad[: max(1, int(s * len(bad)))].mean()) for s in shares]
        return {
            **report, "seconds": time.perf_counter() - started, "gaps": isolator.gaps_, "epochs": isolator.epochs_,
            "isolated": made.isolated.nonzero()[:, 0].tolist(), "pseudo": made.pseudo_labels[made.isolated].tolist(),
            "shares": shares.tolist(), "precision_by_share": curve,
        }  # fmt: skip

    def prepared(self, isolation: dict[str, Any], fraction: float = 0.0) -> tuple[NAB, NABDataset]:
        mask = torch.zeros(len(self.poisoned), dtype=torch.bool)
        pseudo = torch.from_numpy(self.poisoned.y).clone()
        rows = torch.tensor(isolation["isolated"])
        mask[rows], pseudo[rows] = True, torch.tensor(isolation["pseudo"])
        nab = NAB(
            PrecomputedIsolator(mask), PrecomputedRelabeler(pseudo), self.stamp(), self.run.settings.ratio,
            stamp_clean_fraction=fraction, augment=self.augment,
        )  # fmt: skip
        return nab, nab.prepare(self.poisoned.tensors(), seed=self.run.seed)

    def train(self, data: Any, look: Callable[[FitState], None] | None = None) -> tuple[nn.Module, float]:
        task, net = self.task, self.network()
        started = time.perf_counter()
        augment = None if isinstance(data, NABDataset) else self.augment
        if isinstance(data, NABDataset) and data.augment is None:
            data = data.tensors()
        fit_classifier(
            net, data, task.epochs, task.lr, augment=augment, batch_size=self.run.settings.batch_size, seed=self.run.seed,
            device=self.run.device, callbacks=[look] if look else (),
        )  # fmt: skip
        return net, time.perf_counter() - started

    def undefended(self, rate: float | None = None) -> dict[str, Any]:
        net, seconds = self.train((self.poisoned if rate is None else self._poison(rate)).tensors())
        return {**attack_metrics(net, self.test, self.attacked).as_dict(), "seconds": seconds}

    def defended(self, isolation: dict[str, Any], fraction: float = 0.0) -> dict[str, Any]:
        """The whole method, with what its filter does and the attack's success without the stamp."""
        nab, data = self.prepared(isolation, fraction)
        curves: list[list[float]] = []

        def look(state: FitState) -> None:
            if state.epoch_end:
                deployed = nab.wrap(state.model)
                curves.append([*self._curve(deployed), *self._curve(state.model)[1:]])

        net, seconds = self.train(data, look)
        deployed = nab.wrap(net)
        report = evaluate_defense(net, deployed, self.test, self.attacked)
        assert report.filter is not None
        filtered = {k: v for k, v in report.filter.as_dict().items() if not k.startswith("n_")}
        columns = dict(zip(("acc_curve", "asr_curve", "unstamped_curve"), np.array(curves).T.tolist(), strict=True))
        return {
            **report.after.as_dict(), "asr_without_stamp": report.before.asr, "acc_without_stamp": report.before.acc,
            **filtered, "seconds": seconds, **columns,
        }  # fmt: skip

    def _curve(self, net: nn.Module, count: int = 500) -> tuple[float, float]:
        x, y = (t[:count] for t in self.test)
        bad, target = (t[:count] for t in self.attacked.tensors())
        return (
            accuracy_of(net, x, y), accuracy_of(net, bad, target)
        )  # fmt: skip

    def relabelled(self, isolation: dict[str, Any]) -> dict[str, Any]:
        """The control: believed labels without a stamp."""
        _, data = self.prepared(isolation)
        net, seconds = self.train((self.poisoned.tensors()[0], data.pseudo_labels))
        return {**attack_metrics(net, self.test, self.attacked).as_dict(), "seconds": seconds}

    def removed(self, isolation: dict[str, Any]) -> dict[str, Any]:
        """Training without the isolated samples."""
        keep = torch.ones(len(self.poisoned), dtype=torch.bool)
        keep[isolation["isolated"]] = False
        x, y = self.poisoned.tensors()
        net, seconds = self.train((x[keep], y[keep]))
        return {**attack_metrics(net, self.test, self.attacked).as_dict(), "seconds": seconds}

    def unlearned(self, isolation: dict[str, Any]) -> dict[str, Any]:
        """As in anti-backdoor learning: train on all, then ascend on the isolated samples."""
        x, y = self.poisoned.tensors()
        rows = torch.tensor(isolation["isolated"])
        net, seconds = self.train((x, y))
        started = time.perf_counter()
        fit(
            net, (x[rows], y[rows]), rule=Backprop(lambda out, target: -F.cross_entropy(out, target).clamp(max=5.0)),
            optimizer=partial(torch.optim.SGD, lr=self.run.settings.unlearn_lr), epochs=5,
            batch_size=self.run.settings.batch_size, drop_last=True, seed=self.run.seed, device=str(self.run.device),
            progress=False,
        )  # fmt: skip
        seconds += time.perf_counter() - started
        return {**attack_metrics(net, self.test, self.attacked).as_dict(), "seconds": seconds}


def figures(results: Results) -> dict[str, Figure]:
    """All defences beside each other, the course of training, and how precise isolation is."""
    return {"defences": _bars(results), "training": _course(results), "isolation": _precision(results)}


def _bars(results: Results) -> Figure:
    names = ["clean", "undefended", "nab", "nab_stamped", "relabel", "remove", "unlearn"]
    labels = ["never\npoisoned", "no\ndefence", "NAB", "NAB, clean\nstamped too", "relabel\nonly", "remove", "unlearn"]
    fig, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for k, (value, label) in enumerate(
        (("acc", "clean accuracy"), ("asr", "attack success"), ("bacc", "true class of triggered"))
    ):
        seeds = np.stack([results.values(name, value) for name in names], 1)
        place = np.arange(len(names)) + (k - 1) * 0.27
        ax.bar(place, seeds.mean(0), 0.27, label=label, alpha=0.7)
        ax.plot(np.repeat(place[None], len(seeds), 0).ravel(), seeds.ravel(), "k.", ms=4)
    ax.set_xticks(range(len(names)), labels, fontsize=9)
    ax.set(ylabel="share; dots are seeds", ylim=(0, 1.15))
    ax.legend(ncols=3, loc="upper center")
    return fig


def _course(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    shown = (("acc_curve", "clean accuracy"), ("asr_curve", "attack success, stamped"), ("unstamped_curve", "attack success, unstamped"))  # fmt: skip
    for value, label in shown:
        curves = results.values("nab", value)
        epochs = 1 + np.arange(curves.shape[1])
        ax.plot(epochs, curves.mean(0), label=label)
        ax.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.2)
    ax.set(xlabel="epoch", ylabel="share", ylim=(0, 1.02))
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def _precision(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    scenes = {"isolation": results.settings.digits.data}
    if results.settings.photos is not None:
        scenes["photos_isolation"] = results.settings.photos.data
    for arm, label in scenes.items():
        shares, curves = results.values(arm, "shares")[0], results.values(arm, "precision_by_share")
        ax.plot(100 * shares, curves.mean(0), label=label)
        ax.fill_between(100 * shares, curves.min(0), curves.max(0), alpha=0.2)
    ax.axhline(results.settings.rate, c="grey", ls=":", label="chance")
    ax.axvline(100 * results.settings.ratio, c="k", ls="--", lw=1)
    ax.set(xlabel="isolated samples (%)", ylabel="share that is poisoned", ylim=(0, 1.02))
    ax.legend()
    return fig


def peers(bench: Any) -> None:
    """Poisoning a set, and an epoch of the defence's batches, against the lines that one would write for them."""
    x, y = torch.rand(10_000, 3, 32, 32), torch.randint(10, (10_000,))
    trigger = PatchTrigger.checkerboard((3, 32, 32))
    others = (y != 0).nonzero()[:, 0]

    def poisoned_by_hand() -> None:
        rows = others[torch.randperm(len(others))[:1000]]
        images, labels = x.clone(), y.clone()
        chosen = images[rows]
        images[rows] = (255 * torch.lerp(chosen, trigger.pattern, trigger.mask)).round() / 255
        labels[rows] = 0

    bench.compare(
        "poison 10 % of 10,000 images of 32 x 32",
        ours=lambda: poison((x, y), trigger, AllToOne(0, 10), rate=0.1, seed=0).tensors(),
        by_hand=poisoned_by_hand,
    )
    mask, flip, stamp = torch.rand(len(x)) < 0.05, CropFlip(padding=0), Stamp(value=0.5)
    isolated = NAB(PrecomputedIsolator(mask), PrecomputedRelabeler((y + 1) % 10), stamp, augment=flip)
    data = isolated.prepare((x, y))

    def epoch() -> None:
        for _ in as_batches(data, 128, seed=0).epoch(0):
            pass

    def epoch_by_hand() -> None:
        for rows in torch.randperm(len(x)).split(128):
            images, _ = flip(x[rows]), data.pseudo_labels[rows]
            images[mask[rows], :, :2, :2] = 0.5

    bench.compare("an epoch of 10,000 images of 32 x 32, flipped, in batches of 128", ours=epoch, by_hand=epoch_by_hand)
