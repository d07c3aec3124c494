"""Methods of different kinds on one network: binary layers, block-wise training and a guide at once."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from torchfolio.data import load
from torchfolio.efficiency.biper import BiPerConv2d, binarize, set_stage
from torchfolio.engine import LearningRule, evaluate, fit
from torchfolio.local.auglocal import AugLocal
from torchfolio.models import resnet20
from torchfolio.training.guidance import Guidance, GuidedRule

SMALL = {"num_classes": 10, "in_channels": 1}


@pytest.fixture(scope="module")
def digits():
    return load("digits", train_size=512)


def binary_network() -> nn.Module:
    torch.manual_seed(0)
    return binarize(resnet20(**SMALL), binary_input=False)


def guided(net: nn.Module) -> GuidedRule:
    torch.manual_seed(1)
    return GuidedRule(Guidance(net, resnet20(**SMALL), alpha=1.0), AugLocal(2))


def test_guided_auglocal_trains_a_binary_resnet(digits):
    net = binary_network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    result = fit(
        net, digits.train, rule=guided(net), optimizer=sgd, epochs=3, batch_size=64, drop_last=True, device="cpu"
    )
    losses, guidance = result.history["loss"], result.history["guidance"]
    assert losses[-1] < losses[0]
    assert guidance[-1] < guidance[0]
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    set_stage(net, 2)
    fit(net, digits.train, rule=guided(net), optimizer=sgd, epochs=1, batch_size=64, drop_last=True, device="cpu")
    assert evaluate(net, digits.test)["accuracy"] > 0.3
    layers = [m for m in net.modules() if isinstance(m, BiPerConv2d)]
    assert layers
    for layer in layers:
        weight = layer.binary_weight()
        assert torch.equal(weight.abs(), torch.ones_like(weight))


def test_the_guide_leaves_blocks_apart(digits):
    """Each backward, guidance included, reaches parameters that no other backward reaches."""
    net = binary_network()
    rule: LearningRule = guided(net)
    batch = digits.train[:32]
    module = rule.prepare(net, batch)
    reached: list[set[str]] = []

    def backward(loss: Tensor) -> None:
        module.zero_grad(set_to_none=True)
        loss.backward()
        reached.append({name for name, p in module.named_parameters() if p.grad is not None})

    rule.step(batch, backward)
    assert len(reached) > 2
    assert sum(map(len, reached)) == len(set().union(*reached))
    assert set().union(*reached) == {name for name, p in module.named_parameters() if p.requires_grad}


def test_the_composed_network_can_be_copied(digits):
    net = binary_network()
    rule = guided(net)
    rule.prepare(net, digits.train[:32])
    copied = copy.deepcopy(net)
    with torch.no_grad():
        x = digits.test[:4][0]
        assert torch.equal(net.eval()(x), copied.eval()(x))
