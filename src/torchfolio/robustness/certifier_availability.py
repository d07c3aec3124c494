"""Attacks on the availability of a system that abstains where it cannot certify its prediction.

Where a certifier gives no certificate, a fallback must answer: a person, a slower network. Whoever can make certificates
fail, with the predictions right, overloads it. Here are three ways, and an audit of how a system stands against them:

- `find_abstaining`: inputs near a given one that abstain by nature, or by search;
- `poison`: a small share of training samples with a trigger and labels in conflict, so that the decision boundary runs
  through the balls around all triggered inputs;
- `AvailabilityBackdoor`: a term of the training loss that pulls the certified margin of triggered inputs below 0.

It is for red teams; no defence against it is known to suffice.

Reference:
    Lorenz, Kwiatkowska, Fritz, "Certifiers Make Neural Networks Vulnerable to Availability Attacks", AISec 2023.
    Constructions of poison and loss are ours, by the aims that the paper states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.engine import Batch, Objective
from torchfolio.measure import untouched
from torchfolio.robustness.abstaining import AbstainingClassifier
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.bound_certifiers import BoundCertifier, CrownCertifier, IntervalCertifier
from torchfolio.robustness.certified_training import CertifiedIBP, GaussianNoise, in_full_precision, labelled
from torchfolio.robustness.certifier_base import Certificate, Certifier
from torchfolio.robustness.label_conflicts import (
    BallConflict,
    ImageMap,
    LabelConflict,
    LabelSplit,
    Poisoned,
    PoisonRule,
    TargetLabel,
    bars,
    poison,
    stamped_by,
    whole_examples,
)
from torchfolio.robustness.layer_list import Layers
from torchfolio.robustness.margins import interval_margins
from torchfolio.robustness.properties import Box
from torchfolio.robustness.smoothing_certifier import SmoothingCertifier

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
        x, y = stamped_by(self.trigger, batch[0][:count]), batch[1][:count]
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
        certificate: certificate of them.
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
        eta: largest change of each; 0 asks about the inputs themselves.
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
            attacked = pgd(
                lambda z, own=own: -bounds(z, own).to(z.dtype), part, own, eps=eta, alpha=2.5 * eta / steps, steps=steps,
                clip=certifier.clip, max_batch=len(part), generator=generator,
            )  # fmt: skip
            moved.append(attacked.x_adv)
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
        eta: largest change of evaded inputs, see `find_abstaining`; none by default.
        steps: number of steps of that search.
    """
    x, y = whole_examples(data)
    with untouched(certifier.model, training=False):
        certificates = {"clean": certifier.certify(x)}
        if trigger is not None:
            certificates["triggered"] = certifier.certify(stamped_by(trigger, x))
        if eta is not None:
            certificates["evaded"] = find_abstaining(certifier, x, eta, steps=steps).certificate
    values = [(c.accuracy(y), c.certified_accuracy(y), c.abstain_rate) for c in certificates.values()]
    return AvailabilityReport(tuple(certificates), *(tuple(column) for column in zip(*values, strict=True)))
