"""Ask why test error peaks as a model grows, or why it does not: was a low training loss reached?"""

import math

import torch
from torch import nn

from torchfolio import data
from torchfolio.insight.double_descent import RandomFeatureRegressor, capacity_sweep, compare, gradient_descent_path

wine = data.load("wine", train_size=60)
(x, y), (x_test, y_test) = wine.train.tensors, wine.test.tensors


def build(width, generator):
    hidden = nn.Linear(13, width)
    nn.init.normal_(hidden.weight, std=13**-0.5, generator=generator)
    return nn.Sequential(hidden.requires_grad_(False), nn.Tanh(), nn.Linear(width, 3, bias=False))


def descend(steps):
    def fit(model, train):
        """Full-batch gradient descent on the readout alone, or the exact minimum."""
        features, target = model[:2](x), nn.functional.one_hot(y, 3).float()
        solver = gradient_descent_path(features, target, steps)
        with torch.no_grad():
            model[2].weight.copy_(solver.weights(steps).T)
        return float(solver.train_loss)

    return fit


sweeps = {}
for steps in (100, 10_000, math.inf):
    sweeps[f"{steps} steps"] = capacity_sweep(
        build, [5, 15, 30, 50, 60, 70, 100, 300], descend(steps), (x, y), (x_test, y_test)
    )
print(compare(sweeps, threshold=60))

diabetes = data.load("diabetes")
model = RandomFeatureRegressor(50, solver="heavy_ball", n_steps=100, random_state=0)
model.fit(*(part.numpy() for part in diabetes.train.tensors))
print("R²", model.score(*(part.numpy() for part in diabetes.test.tensors)), "condition number", model.condition_number_)
