"""Lend a perceptron the eye of a convolutional network that was never trained."""

from functools import partial

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.training.guidance import Guidance, GuidedRule

digits = data.load("digits")
target = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
guide = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
)  # fmt: skip
with Guidance(target, guide.eval(), alpha=3.0) as guidance:
    adam = partial(torch.optim.Adam, lr=1e-3)
    engine.fit(
        target, digits.train, val=digits.val, rule=GuidedRule(guidance), optimizer=adam, epochs=10, batch_size=128,
        drop_last=True,
    )  # fmt: skip
    print({" and ".join(pair): round(float(loss), 3) for pair, loss in guidance.per_layer.items()})
print(engine.evaluate(target, digits.test))
