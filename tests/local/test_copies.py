"""Copies of layers in auxiliary networks: redrawn, trainable, and read in their own layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchfolio.engine import fit
from torchfolio.local import MAN
from torchfolio.local.auglocal import copy_architecture
from torchfolio.local.heads import LocalHeads


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.position = nn.Parameter(torch.randn(5, 8) * 0.02)

    def forward(self, x):
        x = x + self.position
        return self.inner(x, x, x)[0]


def test_every_weight_of_a_copy_is_drawn_anew_and_trains():
    layer = Attention().requires_grad_(False)
    fresh = copy_architecture(layer, (5, 8), (5, 8), (5, 8), (5, 8))
    for (name, old), new in zip(layer.named_parameters(), fresh.parameters(), strict=True):
        assert new.requires_grad
        if "bias" not in name:
            assert not torch.equal(old, new), name
    assert 0.01 < float(fresh.position.detach().std()) < 0.04
    assert not any(p.requires_grad for p in layer.parameters())


def test_branches_of_man_are_drawn_anew():
    torch.manual_seed(0)
    net = nn.Sequential(Attention(), copy.deepcopy(Attention()), nn.Sequential(nn.Flatten(), nn.Linear(40, 3)))
    rule = MAN(2, host="linear")
    rule.prepare(net, (torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 0])))
    auxiliary = rule.model.heads[0].auxiliary
    assert not torch.equal(auxiliary.branch.inner.in_proj_weight, net[1].inner.in_proj_weight)
    assert torch.equal(auxiliary.ema.inner.in_proj_weight, net[1].inner.in_proj_weight)


def test_channels_first_without_height_is_told():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"Conv1d gives features .*channels first"):
        fit(net, (torch.randn(12, 2, 8), torch.arange(12) % 3), rule=MAN(2), progress=False)


def test_trainings_of_equal_arguments_share_a_fabric():
    from torchfolio.engine.setup import launch

    one, two = (launch(None, "cpu", "32-true") for _ in range(2))
    assert one is two
    assert launch(None, "cpu", "bf16-mixed") is not one
    assert launch(None, "cpu", "64-true") is not one


def test_similarity_of_volumes_is_told():
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"expected features .*, got \[2, 2, 2, 2\]"):
        fit(net, (torch.randn(4, 1, 4, 4, 4), torch.arange(4) % 3), rule=LocalHeads("predsim"), progress=False)
