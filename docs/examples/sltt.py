"""Make a spiking network of an ordinary one and train it at the memory of one time step."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.spiking import LIF, Unrolled, to_spiking
from torchfolio.spiking.sltt import SLTT

tumours = data.load("breast_cancer")  # a table of 30 features
net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
spiking = to_spiking(net, partial(LIF, tau=1.1))
rule = SLTT(timesteps=6)
adam = partial(torch.optim.Adam, lr=1e-2)
engine.fit(spiking, tumours.train, val=tumours.val, rule=rule, evaluate=rule.evaluate, optimizer=adam, epochs=20)
print(engine.evaluate(Unrolled(spiking, timesteps=6), tumours.test))
