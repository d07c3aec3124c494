"""What experiments share besides pictures: a training step to time, accuracy in percent."""

from __future__ import annotations

import torch
from torch import nn

from torchfolio.engine.recipes import sgd
from torchfolio.runs.bench import training_step
from torchfolio.runs.tasks import accuracy


def test_a_training_step_is_one_of_the_optimizer():
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
    weight = net.weight.detach().clone()
    nn.functional.cross_entropy(net(x), y).backward()
    assert net.weight.grad is not None
    expected = weight - 0.5 * net.weight.grad
    training_step(net, (x, y), optimizer=sgd(0.5, momentum=0))()
    torch.testing.assert_close(net.weight.detach(), expected)
    before = net.weight.detach().clone()
    training_step(net, (x, y), optimizer=torch.optim.SGD(net.parameters(), 0.5))()
    assert not torch.equal(net.weight, before)


def test_accuracy_is_in_percent():
    x, y = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert accuracy(nn.Identity(), (x, y)) == 75.0
