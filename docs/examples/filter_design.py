"""Give the first layer of a small network filters learned from unlabelled images, and scale its other layers."""

import torch
from torch import nn

from torchfolio.data import load
from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import adam
from torchfolio.layers import FilterLearner, bench, filter_count, init_, random_bank, select_filters

data = load("digits", normalize=False)
x, y = data.train.tensors
print("what patches of side 3 ask for:", filter_count(x, 3))

learner = FilterLearner("kmeans", n_filters=16, size=3, random_state=0).fit(x)
indices, gains = select_filters(learner.bank_, x, y, "joint", n=8)
bank = learner.bank_.take(indices)
print(bench([bank, random_bank(8, 3)], data.train.tensors, data.test.tensors).to_string(index=False))

torch.manual_seed(0)
net = nn.Sequential(bank.as_patch_norm_conv(padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
                    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))  # fmt: skip
init_(net[2:], "lsuv", data=net[:2](x[:256]).detach())
fit(net, data.train, optimizer=adam(0.01), epochs=3, progress=False)
print("accuracy after three epochs:", round(evaluate(net, data.test)["accuracy"], 3))
