"""Certifiers: for which inputs a prediction provably holds on a whole ball, and a classifier that abstains elsewhere.

- `IntervalCertifier`, `CrownCertifier`: $L_\\infty$ balls, by bounds on the margins (`margins`);
- `SmoothingCertifier`: $L_2$ balls, for the majority vote of a network under Gaussian noise (Cohen et al., ICML 2019).
"""

from __future__ import annotations

from torchfolio.robustness.abstaining import AbstainingClassifier, Decision
from torchfolio.robustness.bound_certifiers import BoundCertifier, CrownCertifier, IntervalCertifier
from torchfolio.robustness.certifier_base import Certificate, Certifier
from torchfolio.robustness.smoothing_certifier import SmoothingCertifier, clopper_pearson

__all__ = [
    "AbstainingClassifier",
    "BoundCertifier",
    "Certificate",
    "Certifier",
    "CrownCertifier",
    "Decision",
    "IntervalCertifier",
    "SmoothingCertifier",
    "clopper_pearson",
]
