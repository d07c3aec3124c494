"""Turn a trained regressor into a quadratic network with the same outputs, and train it further."""

import torch
from torch import nn

from torchfolio.data import load
from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import adam, cosine
from torchfolio.layers import quadratic_strength, relinear_param_groups, to_quadratic

data = load("diabetes")
targets = data.train.tensors[1]
mean, std = targets.mean(), targets.std()
train, test = ((part.tensors[0], ((part.tensors[1] - mean) / std)[:, None]) for part in (data.train, data.test))

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
fit(net, train, optimizer=adam(0.01), scheduler=cosine(), epochs=20, batch_size=32, progress=False)
print("ordinary network: test error", round(evaluate(net, test)["loss"], 3))

before = net(test[0]).detach()
to_quadratic(net, where=lambda name, layer: name == "0")
print("largest change by the conversion:", float((net(test[0]).detach() - before).abs().max()))

groups = relinear_param_groups(net, lr=0.003, gamma=0.1)
fit(net, train, optimizer=torch.optim.Adam(groups), epochs=10, batch_size=32, progress=False)
print("quadratic network: test error", round(evaluate(net, test)["loss"], 3))
print("share of the quadratic part:", quadratic_strength(net, test[0]))
