"""See how far a classifier of wines can be believed: decide by its probabilities, at rationalities of several kinds."""

import torch
from torch import nn

from torchfolio.data import Examples, load
from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.insight import Believability, fit_temperature, rational_choice, regret_bounds
from torchfolio.measure import outputs

wine = load("wine")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(13, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 3))
fit(net, wine.train, optimizer=adam(0.003), epochs=60, batch_size=16, progress=False)

logits, y = outputs(net, wine.test), wine.test.tensors[1]
regret, loss, bound = regret_bounds(logits, y)
print(f"mean regret {regret.mean():.3f} <= log loss {loss.mean():.3f} <= {bound.mean():.3f}")

kappa = fit_temperature(*(outputs(net, wine.val), wine.val.tensors[1]))
right = rational_choice(logits, kappa).exp().gather(1, y[:, None]).mean()
print(f"rationality by likelihood {kappa:.2f}: a draw is right with probability {right:.3f}")

panel = Believability().look(net, data=Examples(wine.test))
print("\n".join(panel.sentences))
print(panel.tables[0].round(3).to_string(index=False))
