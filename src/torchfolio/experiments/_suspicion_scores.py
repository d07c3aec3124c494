"""Scores of suspicion side by side: those from BaDExpert's two confidences, and STRIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor import PoisonedDataset
from torchfolio.backdoor.badexpert import SCORES, BaDExpert, suspicion
from torchfolio.backdoor.metrics import auroc
from torchfolio.experiments._backdoors import Pair
from torchfolio.measure import outputs


def side_by_side(detector: BaDExpert, test: Pair, attacked: PoisonedDataset, trusted: Tensor) -> dict[str, Any]:
    """AUROC of each, of triggered images that succeed against clean ones that are told right; confidences of some."""
    triggered, target = attacked.tensors()
    *good, labels = detector.confidences(test[0])
    *bad, attacked_labels = detector.confidences(triggered)
    right, reached = labels == test[1], attacked_labels == target
    good, bad = [part[right] for part in good], [part[reached] for part in bad]
    result: dict[str, Any] = {
        "auroc_strip": auroc(*(strip(detector.model_, x, trusted) for x in (test[0][right], triggered[reached]))),
        "points": [torch.cat([a[:400], b[:400]]).tolist() for a, b in zip(good, bad, strict=True)],
        "clean_points": min(400, int(right.sum())),
    }
    for kind in SCORES:
        negatives, positives = (suspicion(b, m, kind, detector.kappa) for b, m in (good, bad))
        result[f"auroc_{kind}"] = auroc(negatives, positives)
    return result


def strip(net: nn.Module, x: Tensor, clean: Tensor, blends: int = 16) -> Tensor:
    """Scores, larger for triggered images: their predictions survive being blended with others, at low entropy.

    Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019.
    """
    total = torch.zeros(len(x), dtype=torch.float64)
    for other in clean[:blends] if len(x) else ():  # there may be no attack that succeeds
        p = outputs(net, 0.5 * (x + other)).double().softmax(1)
        total += -(p * p.clamp_min(1e-12).log()).sum(1)
    return -total / blends
