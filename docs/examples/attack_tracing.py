"""Give four buyers copies of one classifier, and find out on whose copy an attack by queries was made."""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn

from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.robustness import nes, separate, trace, transfer_matrix

X, y = load_digits(return_X_y=True)
x, y = torch.from_numpy(X / 16).float(), torch.from_numpy(y)
train, test = (x[:1400], y[:1400]), (x[1400:1440], y[1400:1440])
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
fit(net, train, optimizer=adam(5e-3), epochs=10)

copies = separate(net, train, keys=[20931, 5507, 88123, 40217], steps=300)  # keys are the vendor's secrets
for name, model in {"classifier": net, **{f"copy {k}": c for k, c in enumerate(copies)}}.items():
    print(f"{name}: accuracy {(model(x[1400:]).argmax(1) == y[1400:]).float().mean():.3f}")

attack = partial(nes, eps=0.2, step=0.02, steps=20, samples=10, clip=(0.0, 1.0))
found = attack(copies[2], *test)  # somebody queries copy 2 until its answers are wrong
incident = trace(copies, found.x_adv[found.success], label=test[1][found.success])
pooled = incident.pooled()
print("named one by one:", torch.bincount(incident.source, minlength=4).tolist(), "pooled:", int(pooled.source))
print(f"inconclusive: {bool(pooled.inconclusive)}, ahead by {float(pooled.margin):.1f}")
print("who is fooled by whose attack:\n", transfer_matrix(copies, attack, test))
