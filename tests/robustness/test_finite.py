"""NaN and infinity: no verifier says "verified" of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.robustness.test_bounds import convolutional, small
from torchfolio.robustness.certifier_base import classes_of
from torchfolio.robustness.certifiers import SmoothingCertifier
from torchfolio.robustness.properties import Box, Property, classification
from torchfolio.robustness.relu_split import ReluSplit
from torchfolio.robustness.verifiers import Crown, CrownSplit, Interval, milp_verify

VERIFIERS = {
    "interval": Interval().decide,
    "crown": Crown().decide,
    "crown by intervals": Crown(intermediate="ibp").decide,
    "split": CrownSplit(max_boxes=500, attack_steps=2).decide,
    "relu": ReluSplit(max_cases=50, attack_steps=2).decide,
    "milp": milp_verify,
    "single precision": Interval(dtype=torch.float32).decide,
}


def around(shape, value=0.5, eps=0.01):
    return Box.ball(torch.full((1, *shape), value, dtype=torch.float64), eps)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
def test_a_network_of_nan_or_infinity_is_refused(verify, number):
    for net, shape in ((small(), (4,)), (convolutional(), (2, 6, 6))):
        net = nn.Sequential(*(m for m in net if not isinstance(m, nn.Tanh | nn.Sigmoid)))
        places = [n for n, t in net.state_dict().items() if t.is_floating_point()]
        for place in places:
            broken = copy.deepcopy(net)
            broken.state_dict()[place].flatten()[0] = number
            classes = broken(torch.zeros(1, *shape, dtype=next(net.parameters()).dtype)).shape[1]
            with pytest.raises(ValueError, match="NaN or infinity in"):
                verify(broken, around(shape), Property.rows(torch.eye(classes).double(), -1e9))


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
def test_what_overflows_is_not_verified(verify):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    for p in net.parameters():
        nn.init.constant_(p, 1e37 if verify == VERIFIERS["single precision"] else 1e200)
    prop = Property.rows(torch.tensor([[1.0, 0.0]]).double())
    if verify is milp_verify:
        with pytest.raises(ValueError, match="overflow"):
            verify(net, around((4,)), prop)
    else:
        assert verify(net, around((4,)), prop, timeout=0.2).status == "unknown"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_boxes_and_properties_are_finite(number):
    x = torch.zeros(1, 3).double()
    with pytest.raises(ValueError, match="finite"):
        Box(x, x + number)
    with pytest.raises(ValueError, match="finite"):
        Box(x - abs(number), x)
    with pytest.raises(ValueError, match=r"finite|eps"):
        Box.ball(x, number, clip=None)
    with pytest.raises(ValueError, match="finite"):
        Property.rows(torch.full((1, 3), number))
    with pytest.raises(ValueError, match="finite"):
        Property.rows(torch.ones(1, 3), number)


def test_a_bound_that_is_infinite_or_nan_shows_nothing():
    prop = classification(0, 3)
    for number in (math.nan, math.inf):
        assert not bool(prop.holds(torch.tensor([[1.0, number]]).double())[0])
    assert bool(prop.holds(torch.tensor([[1.0, 2.0]]).double())[0])


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
def test_a_property_of_other_outputs_is_refused(verify):
    with pytest.raises(ValueError, match="outputs"):
        verify(small(), around((4,)), classification(0, 7))


def test_a_network_of_nan_is_not_smoothed_into_certainty():
    """Every vote for a class that nothing was said for would make a certificate of it."""
    certifier = SmoothingCertifier(small(), 0.1, 0.1, n0=10, n=50)
    x = torch.rand(2, 4, dtype=torch.float64)
    certifier.certify(x)
    next(certifier.model.parameters()).data.flatten()[0] = math.nan
    with pytest.raises(ValueError, match="holds NaN"):
        certifier.certify(x)
    with pytest.raises(ValueError, match="answers with NaN"):
        classes_of(torch.tensor([[0.0, math.nan]]))
