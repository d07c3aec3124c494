"""Audit a network that may send several classes to several targets, with a few clean images."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.backdoor import UMD, X2X, AdditiveTrigger, poison

torch.manual_seed(0)
# A stranger's network: a faint chessboard turns zeros, threes, fives and eights into other digits.
digits = data.load("digits", normalize=False, val=0)
trigger, labels = AdditiveTrigger.shape("chessboard", digits.shape, 0.15), X2X({0: 6, 3: 1, 5: 2, 8: 7}, 10)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
poisoned = poison(digits.train.tensors, trigger, labels, rate=0.3, mode="append", seed=0)
engine.fit(net, poisoned.tensors(), epochs=25, optimizer=partial(torch.optim.Adam, lr=3e-3), progress=False)

# What you do: clean images with their labels, and the network.
verdict = UMD().scan(net, digits.test.tensors)
print(*verdict.sentences(), sep="\n")
print("pairs that work best for each other:", verdict.core)
print("those of the attack:", tuple(labels.pairs().items()))
