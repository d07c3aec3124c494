"""Replace the LayerNorms of a small transformer that tells digits by their rows, and watch the new norms train."""

import torch
from torch import nn

from torchfolio.data import load
from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import adam, one_cycle
from torchfolio.layers import NormMonitor, convert_layernorm

digits = load("digits", train_size=512)


class Rows(nn.Module):
    """A transformer over the eight rows of an image."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8 * 32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.squeeze(1))).flatten(1))


torch.manual_seed(0)
net = convert_layernorm(Rows(), warmup_steps=10)
with NormMonitor(net) as monitor:
    fit(net, digits.train, optimizer=adam(0.003), scheduler=one_cycle(), epochs=6, batch_size=64, progress=False)
print("test accuracy:", evaluate(net, digits.test)["accuracy"])
print(monitor.to_frame().groupby("layer")[["deviation", "gamma", "nu"]].mean())
