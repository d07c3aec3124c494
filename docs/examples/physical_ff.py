"""Train a network around a black box that knows nothing of PyTorch, and go on after it drifts."""

import numpy as np

from torchfolio import data
from torchfolio.local import PhysicalBlock, PhysicalLocalNet, as_physical

wine = data.load("wine")  # a table of 13 features, 3 classes
x, y = wine.train.tensors
random = np.random.default_rng(0)
mixing = [random.normal(size=(16, 16)), random.normal(size=(12, 16))]
boxes = [
    as_physical(lambda v, A=A: np.tanh(v @ A) ** 2, len(A), 16, numpy=True, noise_std=0.01)  # your device here
    for A in mixing
]
net = PhysicalLocalNet([PhysicalBlock(box, 12, seed=k) for k, box in enumerate(boxes)], num_classes=3, n_features=13)
net.fit(x, y, epochs=20)
print("accuracy", net.score(*wine.test.tensors), "after", net.physical_calls, "measurements")
print("weight on the physics", [round(block.reliance(), 2) for block in net.blocks])

for box in boxes:
    box.drift(0.8)
print("after a drift", net.score(*wine.test.tensors))
net.partial_fit(x, y, epochs=5)
print("after 5 more epochs", net.score(*wine.test.tensors))
print("goodness of the candidates", net.goodness(wine.test.tensors[0][:1]).sum(2).numpy().round(2))
