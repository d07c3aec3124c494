"""Ask whether a classifier's adversarial examples buy it accuracy or come of overfitting."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from torchfolio.engine import fit
from torchfolio.robustness import RidgePath, analyse, regularisation_path, tilt_to_data

X, y = load_digits(return_X_y=True)
X, y = X / 16, y
model = LogisticRegression(C=1.0, max_iter=2000).fit(X[:1200], y[:1200])  # all ten classes; any pair can be looked at
report = analyse(model, X[1200:], y[1200:], classes=(4, 9))
print(f"4 and 9: angle {report.angle:.0f} degrees, strength {report.strength:.2f}, errors {report.errors}")

pair = (y == 4) | (y == 9)
X, y = X[pair], y[pair]
train, val = (X[::2], y[::2]), (X[1::2], y[1::2])
path = RidgePath(*train, alphas=np.logspace(2, -6, 9)).to_frame(*val)
print(path.round(3).to_string(index=False))
print(regularisation_path(lambda C: LogisticRegression(C=C, max_iter=5000), [1e-3, 1e-1, 10], *train, *val).round(3))

w, b = model.coef_[9] - model.coef_[4], model.intercept_[9] - model.intercept_[4]
tilted, offset = tilt_to_data(
    w, b, *train, angle=80
)  # where the images hardly vary: the same answers, stronger attacks
print("changed answers", int(((val[0] @ tilted + offset > 0) != (val[0] @ w + b > 0)).sum()), "of", len(val[0]))

net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
x, labels = torch.from_numpy(X).float(), torch.from_numpy((y == 9).astype(np.int64))
fit(net, (x[::2], labels[::2]), epochs=20)
print(analyse(net, x[1::2], labels[1::2]).to_frame().round(2).T.to_string(header=False))
