"""Ask what an activation becomes in an infinitely wide and deep network, and classify with the best one."""

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from torchfolio.theory import InfiniteNetworkClassifier, OptimalActivation, classify_activation

for activation in (nn.ReLU(), nn.Tanh(), OptimalActivation(5)):
    report = classify_activation(activation)
    print(activation, "->", report.kind, "with exponent", round(report.alpha, 3))

# Ten classes of images, taken as directions: rows are divided by their norms.
X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
model = InfiniteNetworkClassifier(intrinsic_dim="estimate").fit(X_train, y_train)
print("intrinsic dimension", model.intrinsic_dim_)
print("infinite depth", model.score(X_test, y_test))

shallow = InfiniteNetworkClassifier("relu", depth=3).fit(X_train, y_train)
print("three layers of ReLU", shallow.score(X_test, y_test))
