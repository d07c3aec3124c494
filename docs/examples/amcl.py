"""Learn features of digits without labels by three adaptive heads, and see what a linear probe reads from them."""

import torch
from torch import nn

from torchfolio import data, engine
from torchfolio.data.views import Compose, ResizedCrop
from torchfolio.engine.recipes import adam
from torchfolio.measure import outputs
from torchfolio.measure.probes import linear_probe
from torchfolio.training import AMCL

digits = data.load("digits", train_size=600)
torch.manual_seed(0)
encoder = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(),
)  # fmt: skip


def noise(x, generator=None):
    return x + 0.3 * torch.randn(x.shape, generator=generator, device=x.device)


rule = AMCL(Compose([ResizedCrop((0.5, 1.0)), noise]), out_dim=32)
result = engine.fit(encoder, digits.train, rule=rule, optimizer=adam(0.003), epochs=5, batch_size=100, drop_last=True)
print(result.history.to_frame()[["loss", "positive_temperature", "negative_temperature"]])
(_, y), (_, y_test) = digits.train.tensors, digits.test.tensors
print(
    "linear probe",
    linear_probe(outputs(encoder, digits.train), y, outputs(encoder, digits.test), y_test, max_iter=1000),
)
