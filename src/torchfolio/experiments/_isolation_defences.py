"""A poisoned training set, and trainings that make different use of the samples isolated in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.backdoor import PoisonedDataset, poison, poisoned_test
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
from torchfolio.engine import Backprop
from torchfolio.engine.state import FitState
from torchfolio.experiments._backdoors import attack, divide, victim
from torchfolio.runs import Run


@dataclass(frozen=True)
class Task:
    """One data set, its attack and the settings of the defence on it.

    Attributes:
        data: name of the images.
        attack: name of the attack, see `torchfolio.experiments._backdoors.attack`.
        train_size: training images; `None` takes all.
        test_size: test images, of which `clean_size` are verified and not reported on; `None` takes all.
        clean_size: verified images.
        network: `"conv"` or `"resnet18"`.
        width: width of the network.
        epochs: number of epochs of the final training.
        lr: learning rate of the final training.
        isolation_epochs: number of epochs of each training of the isolator.
        isolation_lr: learning rate of the isolator.
        restarts: trainings of the isolator.
        looks: its measurements an epoch.
        verified_epochs: number of epochs of the classifier of verified images.
        verified_lr: learning rate of that classifier.
        stamp: value of the stamp, or `"mean"`.
        flip: whether to train on flipped images too.
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


class Scene:
    """A poisoned training set, verified images, a test set, and trainings on them."""

    def __init__(self, run: Run[Any], task: Task) -> None:
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
        images: Any = self.data.train.tensors
        return poison(images, self.trigger, self.labels, rate=rate, seed=self.run.seed)

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

    def isolate(self) -> dict[str, Any]:
        """Which samples are isolated and how they are relabelled, once for all arms."""
        task, settings = self.task, self.run.settings
        isolator = LGAIsolator(
            self.another, epochs=task.isolation_epochs, lr=task.isolation_lr, looks=task.looks, restarts=task.restarts,
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
            net, data, task.epochs, task.lr, augment=augment, batch_size=self.run.settings.batch_size,
            seed=self.run.seed, device=self.run.device, callbacks=[look] if look else (),
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
        self.run.fit(
            net, (x[rows], y[rows]), rule=Backprop(lambda out, target: -F.cross_entropy(out, target).clamp(max=5.0)),
            optimizer=partial(torch.optim.SGD, lr=self.run.settings.unlearn_lr), epochs=5,
            batch_size=self.run.settings.batch_size, drop_last=True, progress=False,
        )  # fmt: skip
        seconds += time.perf_counter() - started
        return {**attack_metrics(net, self.test, self.attacked).as_dict(), "seconds": seconds}
