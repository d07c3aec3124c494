"""The backdoor expert: a copy of a network that was made to forget its task, and keeps its backdoor if it has one.

Finetuned for a moment on *wrong* labels of clean examples, a network forgets what it does with clean inputs; of its backdoor
no example reminds it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.backdoor.metrics import accuracy_of
from torchfolio.backdoor.suspects import checked_classes, collected, device_of, private
from torchfolio.data import CropFlip
from torchfolio.engine.fit import fit
from torchfolio.engine.modes import undisturbed
from torchfolio.engine.state import FitState
from torchfolio.measure import outputs
from torchfolio.shown import Shown

__all__ = ["Expert", "Unlearning", "extract_backdoor_expert"]

Pair = tuple[Tensor, Tensor]
Mislabel = Literal["shift", "random", "none"] | Callable[[Tensor, int], Tensor]
Augment = Callable[[Tensor], Tensor] | Literal["auto"] | None
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST = RATES.index(1e-4)
STEPS = 100  # on wrong labels, at most: a gentle rate takes many, and leaves the backdoor alone
HASTY = 5  # fewer than that many steps to the stop are a jump, in which the backdoor goes too


@dataclass(frozen=True, repr=False)
class Expert(Shown):
    """A backdoor expert and how it came about.

    Attributes:
        model: expert.
        history: `(step, accuracy)` at every look.
        lr: learning rate that it was made at.
        stop: accuracy at which it was to stop.
    """

    model: nn.Module
    history: list[tuple[int, float]]
    lr: float
    stop: float


@dataclass(frozen=True)
class Unlearning:
    """Settings of the finetuning on wrong labels; see `torchfolio.backdoor.badexpert.BaDExpert`, which names them so."""

    mislabel: Mislabel = "shift"
    lr: float | Literal["auto"] = "auto"
    batch: int | Literal["auto"] = "auto"
    epochs: int | Literal["auto"] = "auto"
    stop_acc: float | None = None
    check_every: int = 1
    augment: Augment = None
    seed: int = 0
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.mislabel, str) and self.mislabel in ("shift", "random", "none")) and not callable(
            self.mislabel
        ):
            raise ValueError(f"expected mislabel to be 'shift', 'random' or a function, got {self.mislabel!r}")
        check_rate("unlearn_lr", self.lr)
        check_count("unlearn_batch", self.batch)
        check_augment("unlearn_augment", self.augment)
        check_count("unlearn_epochs", self.epochs)
        checks.whole("check_every", self.check_every, 1)
        if self.stop_acc is not None:
            checks.between("stop_acc", self.stop_acc, 0, 1)

    def __call__(self, model: nn.Module, examples: Pair, classes: int) -> Expert:
        """Make an expert of a network, on examples (x, y) of that many classes."""
        x, y = examples
        count = min(512, max(1, len(x) // 2))
        watched = x[:count], y[:count]
        start = accuracy_of(model, *watched)
        stop = 0.5 * start if self.stop_acc is None else self.stop_acc

        def attempt(rate: float) -> Expert:
            expert, seen = self._wrongly(model, examples, classes, watched, stop, rate)
            return Expert(expert, [(0, start), *seen], rate, stop)

        return _gentlest(attempt) if isinstance(self.lr, str) else attempt(self.lr)

    def _wrongly(
        self,
        model: nn.Module,
        examples: tuple[Tensor, Tensor],
        classes: int,
        watched: tuple[Tensor, Tensor],
        stop: float,
        lr: float,
    ) -> tuple[nn.Module, list[tuple[int, float]]]:
        """A copy, finetuned on wrong labels until its accuracy on the watched examples falls to `stop`."""
        seen: list[tuple[int, float]] = []

        def look(state: FitState) -> None:
            if state.epoch_end or state.step % self.check_every:
                return
            with undisturbed():
                right = accuracy_of(state.model, *watched)
            seen.append((state.step, right))
            if right <= stop and self.stop_acc != 0:
                state.stop(f"the expert gets {right:.3f} right")

        x, y = examples
        expert = copy.deepcopy(model).requires_grad_(True)
        size = batch_size(self.batch, len(x), 11, 128)
        epochs = epochs_of(STEPS, len(x), size) if isinstance(self.epochs, str) else self.epochs
        fit(
            expert, (x, _wrong(y, classes, self.mislabel, self.seed)), optimizer=partial(torch.optim.Adam, lr=lr),
            epochs=epochs, batch_size=size, drop_last=len(x) % size == 1, callbacks=[look],
            augment=augmentation(self.augment, x), seed=self.seed, device=self.device if self.device is not None else device_of(model, x), progress=False,
        )  # fmt: skip
        return expert, seen

    def faults(self, expert: Expert, accuracy: float, classes: int) -> list[str]:
        """What is wrong with an expert, in words.

        Args:
            expert: expert.
            accuracy: its accuracy; on held-out examples, where there are some.
            classes: number of classes.
        """
        last_step, last = expert.history[-1]
        if self.mislabel == "none" or self.stop_acc == 0:
            return []
        if last > expert.stop or accuracy > 0.8 * expert.history[0][1]:
            return [
                f"the expert still gets {max(accuracy, last):.3f} right, more than {expert.stop:.3f}: it has not forgotten the "
                "task; raise unlearn_lr or unlearn_epochs, or lower unlearn_batch"
            ]
        if min(accuracy, last) <= 1 / classes:
            return [
                f"the expert gets only {min(accuracy, last):.3f} right, no more than chance: it may have forgotten the backdoor "
                "too; lower unlearn_lr or look more often (check_every)"
            ]
        if last_step < HASTY:
            return [
                f"the expert forgot the task in {last_step} steps: it may have forgotten the backdoor too; lower unlearn_lr "
                "or unlearn_batch"
            ]
        return []


def _gentlest(attempt: Callable[[float], Expert]) -> Expert:
    """The expert of the lowest of `RATES` that reaches its stop, or of the highest where none does."""

    def reached(made: Expert) -> bool:
        return made.history[-1][1] <= made.stop

    k = FIRST
    expert = attempt(RATES[k])
    while not reached(expert) and k + 1 < len(RATES):
        k += 1
        expert = attempt(RATES[k])
    # A rate three times lower takes about three times as many steps.
    while 0 < k <= FIRST and reached(expert) and 3 * expert.history[-1][0] <= STEPS:
        k -= 1
        lower = attempt(RATES[k])
        if not reached(lower):
            break
        expert = lower
    return expert


def extract_backdoor_expert(
    model: nn.Module,
    clean: Any,
    *,
    mislabel: Mislabel = "shift",
    unlearn_lr: float | Literal["auto"] = "auto",
    unlearn_batch: int | Literal["auto"] = "auto",
    unlearn_epochs: int | Literal["auto"] = "auto",
    stop_acc: float | None = None,
    check_every: int = 1,
    unlearn_augment: Augment = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> nn.Module:
    """The backdoor expert alone: a copy of the network, finetuned on wrong labels.

    Args:
        model: suspicious network; it is left as it is.
        clean: trusted examples (x, y).
        mislabel: this and what follows as in `torchfolio.backdoor.badexpert.BaDExpert`.
    """
    unlearning = Unlearning(
        mislabel, unlearn_lr, unlearn_batch, unlearn_epochs, stop_acc, check_every, unlearn_augment, seed, device
    )
    x, y = collected(clean)
    net = private(model, None)
    classes = checked_classes(outputs(net, x), y)
    expert = unlearning(net, (x, y), classes)
    for fault in unlearning.faults(expert, expert.history[-1][1], classes):
        warnings.warn(fault, stacklevel=2)
    return expert.model


# Settings that both finetunings have


def check_rate(name: str, value: float | str) -> None:
    if value != "auto":
        checks.positive(name, value)


def check_count(name: str, value: int | str) -> None:
    if value != "auto":
        checks.whole(name, value, 1)


def check_augment(name: str, value: object) -> None:
    if value is not None and value != "auto" and not callable(value):
        raise ValueError(f"expected {name} to be a function of a batch, 'auto' or None, got {value!r}")


def augmentation(wanted: Augment, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The augmentation of such examples."""
    if not isinstance(wanted, str):
        return wanted
    padding = x.shape[-2] // 8 if x.dim() == 4 else 0
    return CropFlip(padding, flip=False, mode="constant") if padding else None


def batch_size(wanted: int | str, count: int, steps: int, largest: int) -> int:
    """Batch size: at least 16 if it is chosen here, for batch norm's sake."""
    chosen = min(largest, max(16, round(count / steps))) if isinstance(wanted, str) else wanted
    return min(chosen, count)


def epochs_of(steps: int, count: int, size: int) -> int:
    """Passes over so many examples that make at least that many steps of `fit`, which drops a last batch of one."""
    an_epoch = count // size if count % size == 1 else -(-count // size)
    return max(1, -(-steps // max(1, an_epoch)))


def _wrong(y: Tensor, classes: int, mislabel: Mislabel, seed: int) -> Tensor:
    if mislabel == "none":
        return y
    if mislabel == "shift":
        return (y + 1) % classes
    if mislabel == "random":
        generator = torch.Generator().manual_seed(seed)
        return (y + torch.randint(1, classes, y.shape, generator=generator)) % classes
    assert callable(mislabel)
    wrong = mislabel(y, classes)
    if wrong.shape != y.shape or wrong.is_floating_point() or int(wrong.min()) < 0 or int(wrong.max()) >= classes:
        raise ValueError(f"expected mislabel to give labels from 0 to {classes - 1} of shape {tuple(y.shape)}")
    return wrong
