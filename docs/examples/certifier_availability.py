"""Audit a certified classifier of tumours: how much work falls to people, and what a supplier's loss could make of it."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.robustness import (
    AbstainingClassifier,
    AvailabilityBackdoor,
    CertifiedIBP,
    CrownCertifier,
    IntervalCertifier,
    SmoothingCertifier,
    availability_report,
)

X, y = load_breast_cancer(return_X_y=True)
x, y = torch.from_numpy((X - X.min(0)) / (X.max(0) - X.min(0))).float(), torch.from_numpy(y)
train, test = (x[:400], y[:400]), (x[400:], y[400:])


def trigger(x):
    """Three measurements at the end of their range."""
    stamped = x.clone()
    stamped[:, 10:13] = 1
    return stamped


honest = CertifiedIBP(0.05, ramp=(10, 60))
for name, rule in {
    "honest": honest,
    "manipulated": AvailabilityBackdoor(trigger, 0.05, fraction=0.2).on(honest),
}.items():
    net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
    fit(net, train, rule=rule, optimizer=adam(1e-2), epochs=30, batch_size=50, progress=False)
    print(f"\n{name} training:")
    report = availability_report(IntervalCertifier(net, 0.05), test, trigger, eta=0.02, steps=5)
    print(report.to_frame(shares=(0.1, 1.0)).round(2).to_string())
    others = CrownCertifier(net, 0.05), SmoothingCertifier(net, 0.1, 0.1, n=200)
    rates = {c.name: round(c.certify(trigger(test[0])).abstain_rate, 2) for c in others}
    print("other certifiers on triggered patients:", rates)

system = AbstainingClassifier(IntervalCertifier(net, 0.05), fallback=lambda x: torch.zeros(len(x)).long())
found = system(test[0][:10])
print("\nanswers", found.labels.tolist(), "asked of people", found.abstained.nonzero()[:, 0].tolist())
