"""Train blocks apart that hear of each other through slowly moving copies of their neighbours."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.local.man import MAN


def block(channels: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU())


digits = data.load("digits")
net = nn.Sequential(
    block(1, 16),
    block(16, 32, 2),
    block(32, 32),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
)
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
engine.fit(net, digits.train, val=digits.val, rule=MAN(), optimizer=sgd, epochs=10)
print(engine.evaluate(net, digits.test))
