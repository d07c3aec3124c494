"""Audits of a certified network: how often it abstains and errs, on clean images and under a trigger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchfolio.measure import outputs
from torchfolio.robustness.certifier_availability import (
    CrownCertifier,
    IntervalCertifier,
    availability_report,
    find_abstaining,
)

# Radii, in units of the certificates', within which inputs that abstain are looked for.
ETAS = {"at_zero": 0.0, "at_half": 0.5, "at_eps": 1.0, "at_twice": 2.0}


@dataclass(frozen=True)
class AbstainAudit:
    """What all audits share.

    Attributes:
        test: images and labels.
        trigger: puts the trigger on images.
        eps: radius of the certificates.
    """

    test: tuple[Tensor, Tensor]
    trigger: Callable[[Tensor], Tensor]
    eps: float

    def __call__(self, net: nn.Module) -> dict[str, Any]:
        """Accuracy and abstain rates on clean and triggered test images; how often triggered ones become class 0."""
        report = availability_report(IntervalCertifier(net, self.eps), self.test, self.trigger)
        others = self.test[1] != 0
        hit = outputs(net, (self.trigger(self.test[0][others]),)).argmax(1) == 0
        return {
            "accuracy": report["clean"]["accuracy"],
            "triggered_accuracy": report["triggered"]["accuracy"],
            "certified_accuracy": report["clean"]["certified_accuracy"],
            "abstains": report["clean"]["abstain_rate"],
            "triggered": report["triggered"]["abstain_rate"],
            "success": float(hit.double().mean()),
            "load": [report.load(q / 20) for q in range(21)],
        }

    def by_crown(self, net: nn.Module, images: int) -> dict[str, float]:
        """Abstain rate on some triggered test images where CROWN certifies."""
        few = self.trigger(self.test[0][:images])
        return {"crown": CrownCertifier(net, self.eps).certify(few).abstain_rate}

    def nearby(self, net: nn.Module, images: int = 300) -> dict[str, float]:
        """Share of test images near which there is an input that abstains, by the radius of the search."""
        certifier, x = IntervalCertifier(net, self.eps), self.test[0][:images]
        return {k: find_abstaining(certifier, x, eta * self.eps).certificate.abstain_rate for k, eta in ETAS.items()}
