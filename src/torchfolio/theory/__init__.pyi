# Written by docs/generate.py from the catalogue.
from torchfolio.theory.convex_relu import ConvexReLUClassifier as ConvexReLUClassifier
from torchfolio.theory.convex_relu import ConvexReLURegressor as ConvexReLURegressor
