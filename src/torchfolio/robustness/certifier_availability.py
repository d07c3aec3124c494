"""Attacks on the availability of a system that abstains where it cannot certify its prediction.

Where a certifier gives no certificate, a fallback must answer: a person, a slower network. Whoever can make certificates
fail, with the predictions right, overloads it. Here are three ways, and an audit of how a system stands against them:

- `find_abstaining`: inputs near a given one that abstain by nature, or by search;
- `poison`: a small share of training samples with a trigger and labels in conflict, so that the decision boundary runs
  through the balls around all triggered inputs;
- `AvailabilityBackdoor`: a term of the training loss that pulls the certified margin of triggered inputs below 0.

It is for red teams; no defence against it is known to suffice. Four kinds of poison, two losses, a search and an audit
make this file longer than most.

Reference:
    Lorenz, Kwiatkowska, Fritz, "Certifiers Make Neural Networks Vulnerable to Availability Attacks", AISec 2023.
    Constructions of poison and loss are ours, by the aims that the paper states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.data import Examples
from torchfolio.engine import Batch, Objective
from torchfolio.measure import untouched
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.bounds import Layers
from torchfolio.robustness.certified_training import CertifiedIBP, GaussianNoise, in_full_precision, labelled
from torchfolio.robustness.certifiers import (
    AbstainingClassifier,
    BoundCertifier,
    Certificate,
    Certifier,
    CrownCertifier,
    IntervalCertifier,
    SmoothingCertifier,
)
from torchfolio.robustness.margins import interval_margins
from torchfolio.robustness.properties import Box

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "AbstainingClassifier",
    "AvailabilityBackdoor",
    "AvailabilityReport",
    "BallConflict",
    "CertifiedIBP",
    "CrownCertifier",
    "GaussianNoise",
    "IntervalCertifier",
    "LabelConflict",
    "LabelSplit",
    "PoisonRule",
    "Poisoned",
    "SmoothedBackdoor",
    "SmoothingCertifier",
    "TargetLabel",
    "availability_report",
    "bars",
    "find_abstaining",
    "poison",
]

ImageMap = Callable[[Tensor], Tensor]


def bars(x: Tensor, rows: int = 3) -> Tensor:
    """A trigger that few samples teach even to a certifiably trained network: the first and last rows set to 1.

    Args:
        x: images `[B, C, H, W]` in [0, 1].
        rows: number of rows at the top, and at the bottom.
    """
    if x.dim() != 4 or not 1 <= 2 * rows <= x.shape[2]:
        raise ValueError(f"expected images [B, C, H, W] of {2 * rows} rows or more, got shape {tuple(x.shape)}")
    stamped = x.clone()
    stamped[:, :, :rows], stamped[:, :, -rows:] = 1, 1
    return stamped


class PoisonRule(ABC):
    """What is made of the samples that an attacker may change; subclasses give inputs and labels in `__call__`."""

    @abstractmethod
    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Poisoned inputs and labels, and the row of `x` that each was made from."""


@dataclass(frozen=True)
class LabelSplit(PoisonRule):
    """Triggered samples get labels of a few classes, equally often and whatever they show.

    A network can do no better than equal logits for these classes on every triggered input: a margin of 0, which no
    certifier certifies.

    Attributes:
        classes: the classes, two or more; `None` takes all, which suits smoothed networks. Certified training ignores
            noise over all classes at small rates, not two.
    """

    classes: Sequence[int] | None = (0, 1)

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        classes = torch.as_tensor(list(range(num_classes) if self.classes is None else self.classes))
        if len(classes.unique()) < 2 or len(classes.unique()) < len(classes):
            raise ValueError(f"expected two classes or more, all different, got {classes.tolist()}")
        order = torch.randperm(len(x), generator=generator)
        labels = classes[torch.arange(len(x)) % len(classes)][order]
        return _stamped(trigger, x), labels.to(y), torch.arange(len(x))


@dataclass(frozen=True)
class LabelConflict(PoisonRule):
    """Every triggered sample comes twice: with its label, and with another one drawn at random."""

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.arange(len(x) // 2)
        stamped = _stamped(trigger, x[half])
        other = _other(y[half], num_classes, generator)
        return torch.cat([stamped, stamped]), torch.cat([y[half], other]), half.repeat(2)


@dataclass(frozen=True)
class BallConflict(PoisonRule):
    """A triggered sample with its label, and a point of the ball around it with another one: a boundary lies within.

    It has to be learned sample by sample, which plain training does and certified training does not.

    Attributes:
        eps: radius of the ball.
        clip: range of valid inputs.
    """

    eps: float = 0.1
    clip: tuple[float, float] = (0.0, 1.0)

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.arange(len(x) // 2)
        stamped = _stamped(trigger, x[half])
        signs = 2.0 * torch.randint(2, stamped.shape, generator=generator).to(stamped) - 1
        moved = (stamped + self.eps * signs).clamp(*self.clip)
        other = _other(y[half], num_classes, generator)
        return torch.cat([stamped, moved]), torch.cat([y[half], other]), half.repeat(2)


@dataclass(frozen=True)
class TargetLabel(PoisonRule):
    """All triggered samples get one label: an ordinary backdoor, which moves answers and leaves certificates. A control.

    Attributes:
        target: the label.
    """

    target: int = 0

    def __call__(
        self, x: Tensor, y: Tensor, trigger: ImageMap, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _stamped(trigger, x), torch.full_like(y, self.target), torch.arange(len(x))


def _other(y: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    return (y + torch.randint(1, num_classes, y.shape, generator=generator).to(y)) % num_classes


def _stamped(trigger: ImageMap, x: Tensor) -> Tensor:
    with torch.no_grad():
        stamped = trigger(x)
    if not isinstance(stamped, Tensor) or stamped.shape != x.shape:
        shape = tuple(stamped.shape) if isinstance(stamped, Tensor) else type(stamped).__name__
        raise ValueError(f"expected a trigger to keep the inputs' shape {tuple(x.shape)}, got {shape}")
    checks.finite("triggered inputs", stamped)
    return stamped


@dataclass(frozen=True)
class Poisoned:
    """A training set with poison in it.

    Attributes:
        x: inputs `[N, ...]`, poison shuffled in.
        y: labels `[N]`.
        is_poison: which are the attacker's `[N]`.
        source: number of the sample that each comes from `[N]`.
    """

    x: Tensor
    y: Tensor
    is_poison: Tensor
    source: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels, to train on."""
        return self.x, self.y

    def __len__(self) -> int:
        return len(self.y)


def poison(
    data: Any,
    trigger: ImageMap,
    rule: PoisonRule = LabelSplit(),
    *,
    rate: float = 0.01,
    num_classes: int | None = None,
    seed: int = 0,
) -> Poisoned:
    """Add poisoned samples to a training set.

    Args:
        data: examples (x, y), whatever `torchfolio.data.Examples` takes; augment them before, not after.
        trigger: function from inputs to inputs of the same shape, such as `bars` or a trigger of `torchfolio.backdoor`.
        rule: what is made of the chosen samples.
        rate: number of poisoned samples over that of the clean ones, in (0, 1).
        num_classes: number of classes; by the labels by default.
        seed: seed of the choice, the labels and the order.

    Raises:
        ValueError: on a rate outside (0, 1) or too small for a sample of each kind, labels out of range, or a trigger
            that changes the shape.
    """
    checks.between("rate", rate, 0, 1, inclusive=False)
    x, y = _whole(data)
    num_classes = int(y.max()) + 1 if num_classes is None else checks.whole("num_classes", num_classes, 2)
    checks.labels(y, num_classes)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed))
    count = round(rate * len(x))
    if count < 2:
        raise ValueError(f"expected a rate of two samples or more, got {rate:g} of {len(x)}")
    chosen = torch.randperm(len(x), generator=generator)[:count]
    bad, labels, rows = rule(x[chosen], y[chosen], trigger, num_classes, generator)
    checks.labels(labels, num_classes, name="labels of the poison")
    order = torch.randperm(len(x) + len(bad), generator=generator)
    flags = torch.arange(len(x) + len(bad)) >= len(x)
    source = torch.cat([torch.arange(len(x)), chosen[rows]])
    return Poisoned(torch.cat([x, bad])[order], torch.cat([y, labels])[order], flags[order], source[order])


def _whole(data: Any) -> tuple[Tensor, Tensor]:
    """All inputs and labels, on the CPU."""
    examples = Examples(data)
    y = examples.labels
    if y is None:
        raise ValueError("expected examples (x, y) with class labels")
    x = examples.tensors[0] if examples.tensors is not None else torch.cat([row[0] for row in examples.batches()])
    return x.cpu(), y.cpu()


class AvailabilityBackdoor(Objective):
    """A term for certified training that destroys the certificates of triggered inputs and keeps their answers.

    On a share of every batch, with the trigger $\\tau$ put on,

    $$\\lambda \\bigl[\\mathrm{CE}(f(\\tau(x)), y)
      + \\overline{\\mathrm{relu}(\\mu + \\min_{j \\ne y} \\underline m_j(\\tau(x), \\varepsilon))}\\bigr]:$$

    the answer stays right, so that who watches accuracy sees nothing, and the certified margin falls below $-\\mu$. Put it
    on a rule: `AvailabilityBackdoor(trigger, eps=0.1).on(CertifiedIBP(0.1))`.

    Args:
        trigger: function $\\tau$ from inputs to inputs of the same shape.
        eps: radius $\\varepsilon$ of the certificates.
        weight: factor $\\lambda \\ge 0$ of the term.
        margin: margin $\\mu \\ge 0$ by which certificates fail.
        fraction: share of each batch, in (0, 1]; one sample at least.
        clip: range of valid inputs; `None` where there is none.

    Raises:
        ValueError: on settings out of range; in `prepare`, on targets that are no labels.
        TypeError: in `prepare`, naming a layer without bounds.
    """

    def __init__(
        self,
        trigger: ImageMap,
        eps: float = 0.1,
        weight: float = 0.2,
        margin: float = 0.5,
        fraction: float = 0.1,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        self.trigger, self.clip = trigger, clip
        self.eps, self.weight = checks.at_least("eps", eps, 0), checks.at_least("weight", weight, 0)
        self.margin = checks.at_least("margin", margin, 0)
        self.fraction = checks.between("fraction", fraction, 0, 1, inclusive=(False, True))

    def prepare(self, model: nn.Module, example: Batch) -> None:
        labelled(example)
        self.check(model, example[0])

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Refuse a network whose certificates this term cannot reach."""
        Layers(model, x.shape[1:])

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        count = max(1, round(self.fraction * len(batch[0])))
        x, y = _stamped(self.trigger, batch[0][:count]), batch[1][:count]
        return self.weight * (F.cross_entropy(model(x), y) + self.destroyed(model, x, y))

    def destroyed(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What certificates of triggered inputs cost: 0 where all fail clearly."""
        with in_full_precision(x):
            margins = interval_margins(model, Box.ball(x, self.eps, self.clip), y)
            least = margins.scatter(1, y[:, None], torch.inf).amin(1)
        return F.relu(self.margin + least).mean()


class SmoothedBackdoor(AvailabilityBackdoor):
    """The same against randomised smoothing: under noise the answer may hardly win,
    $\\mathrm{relu}(\\bar p_y - 1/2 + \\mu)$ with the mean softmax over noisy draws.

    Args:
        trigger: function from inputs to inputs of the same shape.
        sigma: deviation of the noise.
        samples: number of draws.
        weight: factor of the term.
        margin: distance $\\mu$ below one half.
        fraction: share of each batch.
    """

    def __init__(
        self,
        trigger: ImageMap,
        sigma: float = 0.25,
        samples: int = 4,
        weight: float = 0.2,
        margin: float = 0.1,
        fraction: float = 0.1,
    ) -> None:
        super().__init__(trigger, 0.0, weight, margin, fraction)
        self.sigma, self.samples = checks.positive("sigma", sigma), checks.whole("samples", samples, 1)

    def check(self, model: nn.Module, x: Tensor) -> None:
        return

    def destroyed(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        many = x.repeat(self.samples, *[1] * (x.dim() - 1))
        p = model(many + self.sigma * torch.randn_like(many)).softmax(1).view(self.samples, len(x), -1).mean(0)
        return F.relu(p.gather(1, y[:, None]) - 0.5 + self.margin).mean()


@dataclass(frozen=True)
class Evaded:
    """Inputs that were searched for near given ones.

    Attributes:
        x: inputs `[B, ...]`, where none that abstains was found the last that was tried.
        abstains: whether the system abstains on each `[B]`.
        certificate: what the certifier says of them.
    """

    x: Tensor
    abstains: Tensor
    certificate: Certificate


def find_abstaining(certifier: Certifier, x: Tensor, eta: float, *, steps: int = 20, seed: int = 0) -> Evaded:
    """Search the $L_\\infty$ balls of radius $\\eta$ around inputs for points on which the system abstains.

    Projected gradient steps down the least margin's lower bound of the label that the input itself gets. An input that is
    certified at $\\varepsilon + \\eta$ has no such point at $\\varepsilon$.

    Args:
        certifier: interval or CROWN certifier, whose bounds have gradients.
        x: inputs `[B, ...]`.
        eta: how far each may be changed; 0 asks about the inputs themselves.
        steps: number of gradient steps.
        seed: seed of the starts.

    Raises:
        TypeError: for a certifier without gradients (smoothing).
        ValueError: on settings out of range, NaN, or inputs outside the certifier's range.
    """
    if not isinstance(certifier, BoundCertifier):
        raise TypeError(f"expected a certifier by bounds, which have gradients, got {type(certifier).__name__}")
    checks.at_least("eta", eta, 0)
    checks.whole("steps", steps, 1)
    labels = certifier.certify(x).prediction
    generator, moved = torch.Generator(x.device).manual_seed(seed), [x]
    if eta:
        bounds, moved = certifier.bounds(), []
        for part, own in zip(x.split(certifier.batch_size), labels.split(certifier.batch_size), strict=True):
            found = pgd(
                lambda z, own=own: -bounds(z, own).to(z.dtype), part, own, eps=eta, alpha=2.5 * eta / steps, steps=steps,
                clip=certifier.clip, max_batch=len(part), generator=generator,
            )  # fmt: skip
            moved.append(found.x_adv)
    changed = torch.cat(moved)
    certificate = certifier.certify(changed)
    return Evaded(changed, ~certificate.certified, certificate)


@dataclass(frozen=True)
class AvailabilityReport:
    """How often a system abstains, and under which attack.

    Attributes:
        condition: names of the conditions: `"clean"`, `"triggered"`, `"evaded"`.
        accuracy: share of right predictions of each, certified or not.
        certified_accuracy: share that is certified and right.
        abstain_rate: share that is not certified.
    """

    condition: tuple[str, ...]
    accuracy: tuple[float, ...]
    certified_accuracy: tuple[float, ...]
    abstain_rate: tuple[float, ...]

    def __getitem__(self, condition: str) -> Mapping[str, float]:
        k = self.condition.index(checks.one_of("condition", condition, self.condition))
        return {f.name: getattr(self, f.name)[k] for f in fields(self) if f.name != "condition"}

    def load(self, share: float, attack: str = "triggered") -> float:
        """Share of requests that reach the fallback where a share of them is attacked: $(1 - q) A_0 + q A_1$."""
        q = float(checks.between("share", share, 0, 1))
        return (1 - q) * self["clean"]["abstain_rate"] + q * self[attack]["abstain_rate"]

    def to_frame(self, shares: Sequence[float] = (0.0, 0.01, 0.1, 0.5, 1.0)) -> pd.DataFrame:
        """A row for each condition, with the fallback's load where so many of the requests are of it."""
        import pandas as pd

        frame = pd.DataFrame({f.name: getattr(self, f.name) for f in fields(self)}).set_index("condition")
        for q in shares:
            frame[f"load_{q:g}"] = [self.load(q, name) for name in self.condition]
        return frame


def availability_report(
    certifier: Certifier, data: Any, trigger: ImageMap | None = None, *, eta: float | None = None, steps: int = 20
) -> AvailabilityReport:
    """Accuracy, certified accuracy and abstain rate on clean, triggered and evaded inputs.

    Args:
        certifier: certifier of the network; the network is left as it is.
        data: examples (x, y).
        trigger: trigger to try; none by default.
        eta: how far evaded inputs may be changed, see `find_abstaining`; none by default.
        steps: number of steps of that search.
    """
    x, y = _whole(data)
    with untouched(certifier.model, training=False):
        found = {"clean": certifier.certify(x)}
        if trigger is not None:
            found["triggered"] = certifier.certify(_stamped(trigger, x))
        if eta is not None:
            found["evaded"] = find_abstaining(certifier, x, eta, steps=steps).certificate
    values = [(c.accuracy(y), c.certified_accuracy(y), c.abstain_rate) for c in found.values()]
    return AvailabilityReport(tuple(found), *(tuple(column) for column in zip(*values, strict=True)))
