"""Train a network of your own without backprop through the whole of it."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.local.auglocal import AugLocal

digits = data.load("digits")
net = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
    nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
)
rule = AugLocal(aux_depth=1)  # every layer learns from a head of its own, made after a layer that comes later
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
engine.fit(net, digits.train, val=digits.val, rule=rule, optimizer=sgd, epochs=10)
print(engine.evaluate(net, digits.test))  # the heads are gone: `net` is what you wrote
