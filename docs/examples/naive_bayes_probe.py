"""Put a naive Bayes head on the features of a frozen network, from forty labels."""

import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from torchfolio.adaptation import NaiveBayesProbe, crossover, learning_curve, probe
from torchfolio.data import load
from torchfolio.engine import evaluate, fit
from torchfolio.models import collect_features

digits = load("digits")
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
fit(net, digits.train, epochs=15)  # a network from elsewhere; its features are at "2"
print("the network", evaluate(net, digits.test)["accuracy"])

few = [t[:40] for t in digits.val.tensors]
head = probe(net, "2", few)
model = nn.Sequential(*net[:3], head.to_linear())  # an ordinary network with a head in closed form
print("with a head from 40 labels", evaluate(model, digits.test)["accuracy"])

x, y = digits.val.tensors
x_test, y_test = digits.test.tensors
features, test = (collect_features(net, part, "2")["2"] for part in (x, x_test))
heads = {"nb": NaiveBayesProbe(), "lr": LogisticRegression(max_iter=1000)}
curves = learning_curve(features, y, test, y_test, sizes=[12, 20, 40, 80, 140], repeats=5, heads=heads)
for name, curve in curves.items():
    print(name, curve.mean.round(3))
print("logistic regression is better from about", crossover(curves["nb"], curves["lr"]), "labels on")
assert torch.equal(head.predict(test), torch.from_numpy(head.predict(test.double().numpy())))
