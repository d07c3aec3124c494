"""Margins of a batch beside bounds label by label, and smoothing beside a loop over inputs."""

from __future__ import annotations

from typing import Any

import torch

from torchfolio.models import MLP
from torchfolio.robustness.certifier_availability import SmoothingCertifier


def peers(bench: Any) -> None:
    from torchfolio.robustness import Box, classification
    from torchfolio.robustness.interval_bounds import ibp
    from torchfolio.robustness.margins import interval_margins

    torch.manual_seed(0)
    net, x, y = MLP(784, 10, (128, 128)), torch.rand(256, 784), torch.randint(10, (256,))
    box = Box.ball(x, 0.01)
    bench.compare(
        "interval margins, MLP 784-128-128-10, batch 256",
        ours=lambda: interval_margins(net, box, y),
        label_by_label=lambda: [ibp(net, box[y == k], classification(k, 10)) for k in range(10)],
    )
    certifier = SmoothingCertifier(net, 0.25, 0.25, n=1000)
    bench.compare(
        "smoothing, 50 inputs, n 1,000",
        repeats=3,
        ours=lambda: certifier.certify(x[:50]),
        input_by_input=lambda: [certifier.certify(row[None]) for row in x[:50]],
    )
