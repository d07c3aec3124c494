"""Teach a classifier of wines a shifted cellar by its smallest weights, and keep the change as a small file."""

import copy
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_wine
from torch import nn

from torchfolio.adaptation import SaRA, load_delta, save_delta
from torchfolio.engine import evaluate, fit

torch.manual_seed(0)
table = load_wine()
x = torch.tensor(table.data, dtype=torch.float32)
x, y = (x - x.mean(0)) / x.std(0), torch.tensor(table.target)
net = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
fit(net, (x, y), epochs=20, seed=0)
pretrained = copy.deepcopy(net)

# Another cellar's instruments read everything differently.
shifted = 1.5 * x + torch.linspace(-2, 2, 13)
print("new cellar before:", evaluate(net, (shifted, y))["accuracy"])
optimizer = SaRA(net, fraction=0.15, lr=5e-3)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(shifted), y).backward()
    optimizer.step()
print(f"new cellar after: {evaluate(net, (shifted, y))['accuracy']}, by {optimizer.trainable_count} weights")
print("old cellar after:", evaluate(net, (x, y))["accuracy"])

# The file holds those weights alone; with the pretrained network it gives the tuned one.
with tempfile.TemporaryDirectory() as folder:
    load_delta(save_delta(optimizer, Path(folder) / "cellar.safetensors"), pretrained)
print("same network again:", torch.equal(pretrained(x), net(x)))
