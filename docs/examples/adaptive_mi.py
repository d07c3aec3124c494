"""Follow a network through the information plane while it trains."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.insight.adaptive_mi import AdaptiveBinning, InformationPlaneRecorder, log_spaced

iris = data.load("iris")
x, y = iris.train.tensors
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
recorder = InformationPlaneRecorder(
    net, ["1", "3"], x, y, estimator=AdaptiveBinning(n_bins=8), when=log_spaced(30, 300)
)
engine.fit(net, iris.train, epochs=300, callbacks=[recorder], optimizer=partial(torch.optim.Adam, lr=3e-3))
print(recorder.frame().tail())
print("bits that were given up again:", recorder.compression())
recorder.plot().savefig("plane.png")
