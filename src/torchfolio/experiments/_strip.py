"""STRIP, a detector of triggered inputs that others are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.measure import outputs


def strip(net: nn.Module, x: Tensor, clean: Tensor, blends: int = 16) -> Tensor:
    """Scores, larger for triggered images: their predictions survive being blended with others, at low entropy.

    Gao et al., "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks", ACSAC 2019.
    """
    total = torch.zeros(len(x), dtype=torch.float64)
    for other in clean[:blends] if len(x) else ():  # there may be no attack that succeeds
        p = outputs(net, 0.5 * (x + other)).double().softmax(1)
        total += -(p * p.clamp_min(1e-12).log()).sum(1)
    return -total / blends
