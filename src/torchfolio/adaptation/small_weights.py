"""Weights of small magnitude: the threshold below which a fraction lies, what they do, and whether they stay small."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from torchfolio.checks import between, positive

__all__ = ["Named", "ineffective_drift", "named_parameters", "threshold_for", "zero_smallest"]

Named = nn.Module | Iterable[tuple[str, nn.Parameter]]
"""A module, or pairs of names and parameters."""


def named_parameters(model: Named) -> list[tuple[str, nn.Parameter]]:
    """Parameters by name, of a network or as given."""
    return list(model.named_parameters() if isinstance(model, nn.Module) else model)


def threshold_for(model: Named, fraction: float) -> float:
    """The threshold below which a fraction of all parameters' magnitudes lies.

    Equal magnitudes are below it together or not at all; of many exact zeros all are.

    Raises:
        ValueError: if the fraction is not in (0, 1].
    """
    between("fraction", fraction, 0, 1, inclusive=(False, True))
    size = torch.cat([p.detach().abs().flatten().float().cpu() for _, p in named_parameters(model)])
    rank = max(1, round(fraction * len(size)))
    bound = size.kthvalue(min(rank + 1, len(size))).values
    if rank == len(size) or not bool((size < bound).any()):
        bound = torch.nextafter(bound, torch.tensor(math.inf))
    return float(bound)


def zero_smallest(model: nn.Module, fraction: float) -> nn.Module:
    """A copy of a network whose smallest entries, that fraction of all, are 0."""
    threshold = threshold_for(model, fraction)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.masked_fill_(p.abs() < threshold, 0)
    return other


def ineffective_drift(before: nn.Module, after: nn.Module, threshold: float) -> dict[str, float]:
    """How entries below a threshold changed places in training.

    Returns:
        shares of all entries: below it before, below it after, and those that left and entered.

    Raises:
        ValueError: if the networks differ in their parameters.
    """
    positive("threshold", threshold)
    pairs = [(p.detach(), q.detach()) for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    if any(p.shape != q.shape for p, q in pairs):
        raise ValueError("expected two networks with the same parameters")
    was, now = (torch.cat([(pair[k].abs() < threshold).flatten().cpu() for pair in pairs]) for k in range(2))
    shares = {"before": was, "after": now, "left": was & ~now, "entered": now & ~was}
    return {name: float(value.double().mean()) for name, value in shares.items()}
