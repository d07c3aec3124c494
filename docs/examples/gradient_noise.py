"""Let a perceptron on breast-cancer data start from weights that are all zero, by noise on its gradients."""

import torch
from torch import nn

from torchfolio.data import load
from torchfolio.engine import evaluate, fit
from torchfolio.models import MLP
from torchfolio.training import GradientNoise, gradient_noise_std

data = load("breast_cancer")
print("standard deviations of the noise:", [round(gradient_noise_std(t, eta=0.3), 3) for t in (0, 10, 100, 1000)])
for eta in (0.0, 0.3):
    net = MLP(30, 2, (50, 50))
    for p in net.parameters():
        nn.init.zeros_(p)

    def sgd(parameters, eta=eta):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return GradientNoise(optimizer, eta, generator=torch.Generator().manual_seed(0)).optimizer

    fit(net, data.train, optimizer=sgd, epochs=30, batch_size=32, clip_norm=10.0, progress=False)
    print(f"eta {eta}: test accuracy", round(evaluate(net, data.test)["accuracy"], 3))
