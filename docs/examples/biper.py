"""Convert a convolutional network to one bit per weight."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.efficiency.biper import binarize, pack, quantization_error, set_stage


def size(net: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values())


digits = data.load("digits")
net = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
)  # fmt: skip
train = partial(engine.fit, train=digits.train, val=digits.val)
train(net, epochs=5, optimizer=partial(torch.optim.Adam, lr=3e-3))
print(size(net), "bytes", engine.evaluate(net, digits.test))

net = binarize(net, binary_input=False)  # all convolutions but the first, from the weights they have
train(net, epochs=6, optimizer=partial(torch.optim.Adam, lr=3e-3))
print("distance to binary:", quantization_error(net))
set_stage(net, 2)
train(net, epochs=3, optimizer=partial(torch.optim.Adam, lr=6e-4))
net = pack(net)
print(size(net), "bytes", engine.evaluate(net, digits.test))
