"""Judges of whole networks, and what recovers triggers from them: the base classes of both."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torchfolio.backdoor.metrics import labels_of
from torchfolio.backdoor.suspects import Pair, collected, private
from torchfolio.engine.modes import seeded
from torchfolio.engine.progress import Progress
from torchfolio.measure import untouched
from torchfolio.shown import Shown

__all__ = ["InvertedTrigger", "ModelDetector", "ModelVerdict", "Scan", "TriggerInverter"]

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class ModelVerdict(Shown):
    """What a detector says about a network. Detectors that know more subclass it.

    Attributes:
        is_backdoored: verdict.
        score: suspicion of the network.
        threshold: value that the score was compared with.
        pairs: `(source, target)` classes that are suspected.
        trigger: recovered trigger.
        evidence: figures behind the verdict.
        complete: whether the scan looked at all that it meant to, or was cut short by its time limit.
    """

    is_backdoored: bool
    score: float
    threshold: float
    pairs: tuple[tuple[int, int], ...] = ()
    trigger: Any = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True

    def sentences(self, classes: Sequence[str] = ()) -> list[str]:
        """The verdict in words; `classes` names the network's."""
        word = "suspicious" if self.is_backdoored else "not suspicious"
        sentences = [
            f"The network is {word}: its score is {self.score:.4g} against a threshold of {self.threshold:.4g}."
        ]
        if self.is_backdoored and self.pairs:
            named = [[str(classes[k]) if k < len(classes) else str(k) for k in pair] for pair in self.pairs]
            more = f" and {len(named) - 10} more" if len(named) > 10 else ""
            sentences.append(
                f"Suspected, from class to class: {', '.join(f'{s} to {t}' for s, t in named[:10])}{more}."
            )
        if not self.is_backdoored:
            sentences.append("That is no proof that it has no backdoor.")
        if not self.complete:
            sentences.append("The scan was cut short by its time limit and did not look at everything.")
        return sentences


class Scan(Shown):
    """What a scan runs with: its seed, its time limit and its progress bar.

    Args:
        seed: seed of whatever the method draws; every global generator is seeded with it too.
        budget_seconds: time limit; `None` is none.
        progress: whether to show a bar; `None` does so on a terminal.

    Attributes:
        complete: whether no iteration of `items` was cut short.
    """

    def __init__(self, seed: int = 0, budget_seconds: float | None = None, progress: bool | None = None) -> None:
        if budget_seconds is not None and not budget_seconds > 0:
            raise ValueError(f"expected budget_seconds above 0, got {budget_seconds}")
        self.seed, self._progress = seed, progress
        self._end = math.inf if budget_seconds is None else time.monotonic() + budget_seconds
        self.complete = True

    @property
    def spent(self) -> bool:
        """Whether the time limit is over."""
        return time.monotonic() > self._end

    def items(self, items: Sequence[T], text: str = "") -> Iterator[T]:
        """The items with a bar, the first always; the rest is left out once the time limit is over."""
        with Progress(len(items), show=self._progress) as bar:
            for k, item in enumerate(items):
                if k and self.spent:
                    self.complete = False
                    return
                yield item
                bar.update(k + 1, text)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A new generator with the scan's seed."""
        return torch.Generator(device).manual_seed(self.seed)


class ModelDetector(Shown, ABC):
    """Says whether a network has a backdoor. A method fills `_scan`."""

    needs_clean: ClassVar[bool] = True
    """Whether a scan takes clean examples, or may do without."""

    pixels: ClassVar[bool] = False
    """Whether it works on images in [0, 1], so that a command puts the normalisation into the network first."""

    @abstractmethod
    def _scan(self, model: nn.Module, clean: Pair | None, scan: Scan) -> ModelVerdict:
        """The verdict on a network.

        Args:
            model: network, a copy in evaluation mode whose parameters are frozen.
            clean: inputs `[N, ...]` and labels `[N]` on the CPU, or `None` where the method can do without.
            scan: seed, time limit, progress. Long loops go through `scan.items`.
        """

    def pictures(self, verdict: ModelVerdict, classes: Sequence[str]) -> list[tuple[Any, str]]:
        """Matplotlib figures of a verdict with their captions, for a report; `classes` names the network's."""
        return []

    def scan(
        self,
        model: nn.Module,
        clean: Any | None = None,
        *,
        seed: int = 0,
        budget_seconds: float | None = None,
        progress: bool | None = None,
    ) -> ModelVerdict:
        """The verdict on a network, which is left as it is.

        Args:
            model: suspicious network.
            clean: examples that can be trusted: a pair of tensors, a data set or a loader of (x, y); or a tensor of
                inputs alone, which get the network's own labels.
            seed: seed of the scan; global generators are left where they were.
            budget_seconds: time limit, after which the verdict is given from what was looked at; `None` is none.
            progress: whether to show a bar; `None` does so on a terminal.

        Raises:
            ValueError: if clean examples are needed and missing, hold NaN or have labels out of range.
        """
        if clean is None and self.needs_clean:
            raise ValueError(f"expected clean examples, got none: {type(self).__name__} cannot do without")
        run = Scan(seed, budget_seconds, progress)
        net = private(model, None)
        if isinstance(clean, Tensor):
            clean = (clean, labels_of(net, clean))
        examples = None if clean is None else collected(clean)
        with seeded(seed), untouched(net):
            verdict = self._scan(net, examples, run)
        if math.isnan(verdict.score) or math.isnan(verdict.threshold):
            raise ValueError(
                f"the scan's score is {verdict.score} against {verdict.threshold}: no verdict can be given"
            )
        if not run.complete:
            warnings.warn("the scan was cut short by its time limit and did not look at everything", stacklevel=2)
            verdict = replace(verdict, complete=False)
        return verdict


@dataclass(frozen=True, repr=False)
class InvertedTrigger(Shown):
    """A trigger recovered from a network.

    Attributes:
        delta: pattern that is added to an image.
        mask: places of the pattern; `None` is everywhere.
        asr: function from (model, images) to the share that the trigger sends to the target.
    """

    delta: Tensor
    mask: Tensor | None
    asr: Callable[[nn.Module, Tensor], float]


class TriggerInverter(Shown, ABC):
    """Recovers a trigger from a network."""

    @abstractmethod
    def invert(self, model: nn.Module, x: Tensor, target: int) -> InvertedTrigger:
        """The trigger that sends inputs `[N, ...]` to the class `target`; the network is left as it is."""
