"""Look at how the layers of a network that tells wines apart arrange the three sorts, layer by layer."""

import torch
from torch import nn

from torchfolio.data import Examples, load
from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.insight import Geometry, geometry

wine = load("wine")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(13, 24), nn.Tanh(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
fit(net, wine.train, optimizer=adam(0.005), epochs=40, batch_size=16, progress=False)

x, y = wine.test.tensors
labels = torch.eye(3)  # of the three sorts, a column each
print(
    geometry(net, ["1", "3", "4"], x, y, labels)[["input_alignment", "target_alignment", "participation_ratio"]].round(
        2
    )
)

panel = Geometry().look(net, data=Examples((x, y)))
print(panel.sentences[0])
