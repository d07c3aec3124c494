"""Settings out of range are refused at the door, where once they were taken or failed later."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchfolio.backdoor.badexpert import BaDExpert
from torchfolio.local.auglocal import auxiliary_depths, select_layers
from torchfolio.robustness.attacks import pgd
from torchfolio.theory.convex_relu.admm import admm


@pytest.mark.parametrize("odd", [2.0, -1.0, 0.5, math.nan])
def test_patterns_are_binary(odd):
    generator = torch.Generator().manual_seed(0)
    X, D = torch.randn(6, 3, generator=generator).double(), torch.ones(6, 4)
    D[2, 1] = odd
    with pytest.raises(ValueError, match="patterns of 0 and 1"):
        admm(X, X[:, 0], D, beta=0.1)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -0.1, torch.tensor([0.1, math.nan]), torch.ones(3)])
def test_step_sizes_are_numbers(alpha):
    with pytest.raises(ValueError, match="alpha"):
        pgd(nn.Linear(3, 2), torch.rand(4, 3), torch.zeros(4, dtype=torch.long), eps=0.1, alpha=alpha, steps=2)


def test_layers_and_depths_are_in_range():
    for layer, depth, n_layers in ((-1, 1, 4), (4, 1, 4), (0, -1, 4), (0, 1, 0)):
        for selection in ("uniform", "sequential", "repetitive"):
            with pytest.raises(ValueError, match="expected"):
                select_layers(layer, depth, n_layers, selection)
    with pytest.raises(ValueError, match="selection"):
        select_layers(0, 1, 4, "other")  # pyright: ignore[reportArgumentType]
    for n_layers, depth, tau in ((0, 0, 0.5), (4, 4, 0.5), (4, 9, 0.5), (4, -1, 0.5), (4, 2, 1.5), (4, 2, math.nan)):
        with pytest.raises(ValueError, match="expected"):
            auxiliary_depths(n_layers, depth, tau)
    assert auxiliary_depths(6, 2, 0.0) == [2, 2, 2]


def test_looks_at_an_expert_are_some_steps_apart():
    with pytest.raises(ValueError, match="check_every"):
        BaDExpert(check_every=0)
