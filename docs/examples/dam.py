"""Merge two checkpoints of one network; one is a stranger's and carries a backdoor."""

import copy
from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.adaptation.dam import DefenseAwareMerging
from torchfolio.adaptation.merging import task_arithmetic
from torchfolio.backdoor import AllToOne, PatchTrigger, poison, poisoned_test
from torchfolio.backdoor.metrics import attack_metrics

digits = data.load("digits", normalize=False, val=0)
x, y = digits.train.tensors
base = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
adam = partial(torch.optim.Adam, lr=1e-3)
engine.fit(base, (x[:300], y[:300]), epochs=20, optimizer=adam)

trigger, labels = PatchTrigger.checkerboard(digits.shape, size=2, margin=0), AllToOne(7, 10)
mine, theirs = copy.deepcopy(base), copy.deepcopy(base)
engine.fit(mine, (x[300:800], y[300:800]), epochs=20, optimizer=adam)
engine.fit(theirs, poison((x[800:], y[800:]), trigger, labels, rate=0.2, seed=0).tensors(), epochs=20, optimizer=adam)

attacked = poisoned_test(digits.test.tensors, trigger, labels)
merged = copy.deepcopy(base)
merged.load_state_dict(task_arithmetic(base, [mine, theirs], weight=0.5))
safe = DefenseAwareMerging(
    steps=120, mask_lr=2e-2, weight=0.5, epsilon=0.5, search="restarts", delta_steps=4, adapt_steps=0
).fit(base, [mine, theirs], [x[:500], x[500:1000]])  # inputs alone, no labels
for name, net in {"theirs": theirs, "task arithmetic": merged, "DAM": safe.model}.items():
    print(name, attack_metrics(net, digits.test.tensors, attacked))
