"""Local rules on float targets: they regress as backprop does, or say that they cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchfolio.engine import evaluate, fit
from torchfolio.local import MAN, AugLocal
from torchfolio.local.heads import LocalHeads


def problem(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator)
    target = torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 2].abs()], 1)
    return x, {"[N]": target[:, 1], "[N, 1]": target[:, 1:2], "[N, 3]": target}[shape]


def network(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                         nn.Linear(32, outputs))  # fmt: skip


@pytest.mark.parametrize("shape", ["[N]", "[N, 1]", "[N, 3]"])
@pytest.mark.parametrize(
    "make", [lambda: AugLocal(1), lambda: MAN(2, host="dgl"), lambda: LocalHeads("linear"), lambda: LocalHeads("dgl")]
)
def test_local_rules_regress(make, shape):
    x, y = problem(shape)
    net = network(3 if shape == "[N, 3]" else 1)
    before, weights = evaluate(net, (x, y))["loss"], copy.deepcopy(net.state_dict())
    fit(net, (x, y), rule=make(), optimizer=lambda p: torch.optim.Adam(p, 1e-2), epochs=40, batch_size=50,
        progress=False)  # fmt: skip
    assert evaluate(net, (x, y))["loss"] < before / 3
    assert all(not torch.equal(v, weights[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("make", [lambda: LocalHeads("predsim"), lambda: MAN(2, host="predsim")])
def test_heads_that_need_labels_say_so(make):
    with pytest.raises(ValueError, match=r"learns from class labels, got targets of torch\.float32"):
        fit(network(1), problem("[N, 1]"), rule=make(), progress=False)
