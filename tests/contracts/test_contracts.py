"""The contracts hold for what the library has, and notice what breaks them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from tests.contracts.layers import check_layer
from tests.contracts.rules import check_rule
from torchfolio.engine import Backprop, LearningRule
from torchfolio.local import MAN, AugLocal
from torchfolio.local.heads import LocalHeads
from torchfolio.spiking import SLTT
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.nets import SpikingConvNet
from torchfolio.training import GuidedRule
from torchfolio.training.guidance import Guidance

X, Y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def conv_net():
    torch.manual_seed(0)
    layer = lambda c, d: nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU())  # noqa: E731
    return nn.Sequential(layer(1, 4), layer(4, 4), layer(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


GUIDE = conv_net()


def guided(net):
    return GuidedRule(Guidance(net, copy.deepcopy(GUIDE)))


@pytest.mark.parametrize(
    "make",
    [Backprop, partial(AugLocal, 1), partial(MAN, 2), partial(LocalHeads, "dgl"), partial(LocalHeads, "predsim")],
    ids=["backprop", "auglocal", "man", "dgl", "predsim"],
)
def test_rules(make):
    check_rule(lambda: make(), conv_net(), (X, Y))


def test_guidance():
    check_rule(guided, conv_net(), (X, Y), batch_size=8)  # it compares four examples or more


@pytest.mark.parametrize(
    "make", [partial(SLTT, timesteps=3), partial(SLTT, timesteps=3, k=1), partial(BPTT, timesteps=3)]
)
def test_spiking_rules(make):
    torch.manual_seed(0)
    check_rule(lambda: make(), SpikingConvNet((1, 8, 8), 3, (4, 6)), (X, Y))


class Broken(LearningRule):
    """Trains the first layer alone, and nothing by float targets."""

    def prepare(self, model, example):
        self.model = model
        return model[0]

    def step(self, batch, backward):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        backward(loss)
        return {"loss": loss.detach()}


def test_a_rule_that_leaves_parameters_out_is_noticed():
    with pytest.raises(AssertionError, match="not among the trained"):
        check_rule(Broken, conv_net(), (X, Y))


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(3, 2), torch.randn(4, 3)),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh()), torch.randn(2, 2, 5, 5)),
    ],
)
def test_layers(make, x):
    check_layer(make, x)


class Wide(nn.Linear):
    def forward(self, input):
        return super().forward(input).float()


def test_a_layer_that_returns_another_dtype_is_noticed():
    with pytest.raises(AssertionError, match=r"in, torch\.float32 out"):
        check_layer(lambda: Wide(3, 2), torch.randn(4, 3))
