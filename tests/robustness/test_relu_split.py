"""Verification by the signs of ReLUs: right on networks small enough for an exact answer, and never wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchfolio.robustness.bounds import ElementwiseAffine
from torchfolio.robustness.properties import Box, Property, classification
from torchfolio.robustness.relu_split import ReluSplit
from torchfolio.robustness.verifiers import CrownSplit, milp_verify


def network(seed, inputs=6, width=8, classes=3):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )
    for p in net.parameters():
        p.data *= 2
    return net.double()


def asked(seed, eps):
    net = network(seed)
    x = torch.rand(1, 6, dtype=torch.float64)
    with torch.no_grad():
        label = int(net(x).argmax())
    return net, Box(x - eps, x + eps), classification(label, 3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("attack", [0, 20])
def test_it_agrees_with_the_exact_answer(seed, attack):
    net, box, prop = asked(seed, [0.1, 0.2, 0.3, 0.4][seed % 4])
    wanted = milp_verify(net, box, prop).status
    found = ReluSplit(attack_steps=attack, batch=16, steps=8, root_steps=10).decide(net, box, prop, timeout=60)
    assert found.status == wanted
    if found.witness is not None:
        assert box.contains(found.witness[None]).all()
        with torch.no_grad():
            assert prop.violated(net(found.witness[None])).all()


def test_cases_with_all_signs_are_linear_programs():
    """Without any optimisation only the programs at the leaves decide."""
    statuses = set()
    for seed in range(6):
        net, box, prop = asked(seed, 0.3)
        verifier = ReluSplit(attack_steps=0, steps=1, root_steps=0, candidates=1, batch=64)
        found = verifier.decide(net, box, prop, timeout=60)
        assert found.status == milp_verify(net, box, prop).status
        statuses.add(found.status)
    assert statuses == {"verified", "falsified"}


def test_groups_of_several_rows():
    net = network(3)
    x = torch.rand(1, 6, dtype=torch.float64)
    box = Box(x - 0.2, x + 0.2)
    with torch.no_grad():
        top = net(x)[0]
    # Violated only where both outputs are far below what they are here.
    safe = Property(torch.eye(3, dtype=torch.float64)[:2], top[:2] - 100, torch.zeros(2, dtype=torch.long))
    assert ReluSplit(attack_steps=0).decide(net, box, safe).status == "verified"
    broken = Property(torch.eye(3, dtype=torch.float64)[:2], top[:2] + 1e-3, torch.zeros(2, dtype=torch.long))
    assert ReluSplit(attack_steps=0).decide(net, box, broken).status == "falsified"


def test_convolutions_and_float32():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU()
    )
    net = nn.Sequential(ElementwiseAffine(torch.tensor(2.0), torch.tensor(-0.5)), layers, nn.Linear(8, 3)).double()
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        label = int(net(x).argmax())
    seen = set()
    for eps in (0.02, 0.1, 0.5):
        box, prop = Box(x - eps, x + eps), classification(label, 3)
        wanted = milp_verify(net, box, prop).status
        assert ReluSplit(attack_steps=20).decide(net, box, prop, timeout=60).status == wanted
        narrow = ReluSplit(attack_steps=20, dtype=torch.float32).decide(net, box, prop, timeout=10).status
        assert narrow in (wanted, "unknown")
        seen.add(wanted)
    assert "verified" in seen


def test_it_gives_up_and_says_so():
    net, box, prop = asked(1, 0.3)
    found = ReluSplit(attack_steps=0, max_cases=2, root_steps=0, steps=1).decide(net, box, prop)
    assert found.status == "unknown"
    assert CrownSplit(attack_steps=0, max_boxes=10**6).decide(net, box, prop, timeout=60).status != "unknown"
    with pytest.raises(TypeError, match=r"ReLUs, .*got one with tanh; CrownSplit halves"):
        ReluSplit().decide(
            nn.Sequential(nn.Linear(2, 2), nn.Tanh()), Box(torch.zeros(1, 2), torch.ones(1, 2)), classification(0, 2)
        )
    pooled = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 2))
    with pytest.raises(TypeError, match=r"ReLUs, .*got one with max pools; CrownSplit halves"):
        ReluSplit().decide(pooled, Box(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)), classification(0, 2))
    with pytest.raises(ValueError, match="steps to be a whole number of at least 1"):
        ReluSplit(steps=0)
