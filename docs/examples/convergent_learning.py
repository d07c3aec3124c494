"""Did two networks learn the same features?"""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.insight.convergent_learning import ConvergenceReport

digits = data.load("digits")
nets = []
for seed in (0, 1):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    engine.fit(net, digits.train, epochs=10, optimizer=partial(torch.optim.Adam, lr=3e-3), seed=seed)
    nets.append(net)

report = ConvergenceReport.from_modules(*nets, digits.test, layers=["2", "4", "5"])
print(report.to_frame())
units = report.units()
print(units[units.layer_a == "5"])  # the logits: every one should find its own class
report.plot().savefig("convergence.png")
