"""Update an embedding of wines so that new queries still find what the old model stored."""

import torch
from torch import nn

from torchfolio.adaptation import BT2Adapter, upgrade_report
from torchfolio.data import load
from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.measure import outputs

wine = load("wine")
x, y = wine.train.tensors

# The old model knew few wines, of two sorts.
few = (y < 2).nonzero()[:40, 0]
torch.manual_seed(0)
old = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 2))
fit(old, (x[few], y[few]), optimizer=adam(0.01), epochs=20, batch_size=16, progress=False)

adapter = BT2Adapter(epochs=30, lr=0.01, extra_dim=4, batch_size=16)
new = adapter.adapt(old, (x, y), device="cpu").model
print("classes told apart by the new model:", new(wine.test.tensors[0]).argmax(1).unique().tolist())


class Embedding(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, x):
        return self.embed(x)


stored = nn.functional.normalize(outputs(old[:-1], wine.test.tensors[0]), dim=1)
fresh = outputs(Embedding(new.embed), wine.test.tensors[0])
report = upgrade_report({"old": stored, "new": fresh}, wine.test.tensors[1], truncate=True)
print(report.round(3).to_string(index=False))
