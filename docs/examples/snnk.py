"""Shrink a perceptron's wide layer, adapt a frozen network with few parameters, and solve a classifier in closed form."""

import torch
from torch import nn

from torchfolio.data import load
from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import adam
from torchfolio.layers import BundledClassifier, add_adapters, replace_ffl

data = load("breast_cancer")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 2))
fit(net, data.train, optimizer=adam(0.01), epochs=10, batch_size=32, progress=False)
print("perceptron:", round(evaluate(net, data.test)["accuracy"], 3))

# The first layer keeps 8 numbers for each of its 64 outputs, instead of 31.
replace_ffl(net, lambda name, layer: name == "0", m=8)
fit(net, data.train, optimizer=adam(0.01), epochs=10, batch_size=32, progress=False)
print("with an SNNK layer:", round(evaluate(net, data.test)["accuracy"], 3), [tuple(p.shape) for p in net.parameters()])

# The same measurements from a device that reports their negatives: only an adapter is trained.
x, y = data.train.tensors
x_test, y_test = data.test.tensors
add_adapters(net, lambda name, layer: name == "0", m=8)
print("on other data:", round(evaluate(net, (-x_test, y_test))["accuracy"], 3))
fit(net, (-x, y), optimizer=adam(0.03), epochs=15, batch_size=32, progress=False)
print("with an adapter:", round(evaluate(net, (-x_test, y_test))["accuracy"], 3))

closed_form = BundledClassifier(hidden=(128,), alpha=1e-2, random_state=0).fit(x, y)
print("in closed form:", round(closed_form.score(x_test, y_test), 3))
