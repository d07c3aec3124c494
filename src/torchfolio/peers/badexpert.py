"""Scores of many inputs, against the same three networks and the formula input by input, as the authors' code does."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from torchfolio.backdoor.badexpert import BaDExpert
from torchfolio.backdoor.metrics import labels_of
from torchfolio.backdoor.zoo import SmallConvNet


def peers(bench: Any) -> None:
    torch.manual_seed(0)
    net, x = SmallConvNet(1, 10, width=8).eval(), torch.rand(2000, 1, 28, 28)
    y = labels_of(net, x)
    y[:8] = torch.arange(8)  # a random network says little else than one class
    settings: dict[str, Any] = {"unlearn_lr": 1e-5, "stop_acc": 0.0, "finetune_epochs": 1, "fpr": 0.05}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        detector = BaDExpert(**settings, unlearn_epochs=1).fit(net, (x[:500], y[:500]))

    def one_by_one() -> list[float]:
        b, m, _ = detector.confidences(x)
        return [
            -min(2 * v / max(u, 1e-8), (1 - u) / max(0.5 - v, 1e-8))
            for u, v in zip(b.tolist(), m.tolist(), strict=True)
        ]

    bench.compare("score 2,000 inputs of 28 x 28", ours=lambda: detector.score(x), one_by_one=one_by_one)
