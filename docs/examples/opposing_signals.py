"""Find the digits behind the first rise of the loss in full-batch training at a large step, and how they oppose each other."""

import torch
from torch import nn

from torchfolio.data import load
from torchfolio.insight import find_groups, measure_groups, trace

x, y = load("digits", train_size=300).train.tensors
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))

path = trace(net, (x, y), lr=0.2, steps=50, sharpness_every=25, keep_first_rise=True)
groups = find_groups(path.losses, k=6)
print("sharpness", [round(value, 1) for value in path.sharpness], "at steps", path.steps, "stable below", path.limit)
if groups.instability:
    net.load_state_dict(path.snapshots[groups.step])
    print(f"the loss first rises at step {groups.step}; behind it are digits of the classes", end=" ")
    print(y[groups.positive].tolist(), "and", y[groups.negative].tolist())
else:
    print("no instability seen; a larger step would show one")
print(measure_groups(net, (x, y), groups)[["cosine", "curvature_1", "curvature_2", "norm_ratio"]].round(2))
