"""The contracts hold for what the library has, and notice what breaks them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from tests.contracts.layers import check_layer
from tests.contracts.objectives import check_objective
from tests.contracts.rules import check_rule
from torchfolio.engine import Backprop, LearningRule, Objective
from torchfolio.local import MAN, AugLocal
from torchfolio.local.heads import LocalHeads
from torchfolio.spiking import SLTT
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.nets import SpikingConvNet
from torchfolio.training.guidance import Guidance

X, Y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def conv_net():
    torch.manual_seed(0)
    layer = lambda c, d: nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU())  # noqa: E731
    return nn.Sequential(layer(1, 4), layer(4, 4), layer(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


GUIDE = conv_net()


@pytest.mark.parametrize(
    "make",
    [Backprop, partial(AugLocal, 1), partial(MAN, 2), partial(LocalHeads, "dgl"), partial(LocalHeads, "predsim")],
    ids=["backprop", "auglocal", "man", "dgl", "predsim"],
)
def test_rules(make):
    check_rule(lambda: make(), conv_net(), (X, Y))


def test_guidance():
    # It compares four examples or more.
    check_objective(lambda net: Guidance(net, copy.deepcopy(GUIDE)), conv_net(), (X, Y), batch_size=8)


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


class PartOfIt(Objective):
    """Says that nothing it reads ever ran."""

    def ready(self):
        return False

    def term(self, model, batch):
        return model(batch[0]).square().mean()


def test_an_objective_that_is_never_ready_is_noticed():
    with pytest.raises(ValueError, match="ran nothing of what PartOfIt reads"):
        check_objective(lambda net: PartOfIt(), conv_net(), (X, Y))


class Shrinking(PartOfIt):
    """Outputs near 0, by a pass of its own."""

    def ready(self):
        return True


def test_an_objective_with_a_pass_of_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    check_objective(lambda net: Shrinking(), net, (X, Y))
