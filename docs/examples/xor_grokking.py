"""Watch a network memorise flipped labels first and learn XOR clusters later, in a million dimensions."""

import torch
from torch import nn

from torchfolio import data
from torchfolio.theory.xor_grokking import DualGD, XORNetwork, grokking_time, odd_energy, xor_clusters

generator = torch.Generator().manual_seed(0)
train = xor_clusters(40, 100_000, mu=50.0, noise_rate=0.1, balanced=True, generator=generator)
test = xor_clusters(100, 100_000, mu=50.0, generator=generator)
# Weights on the meta device are never held: they are drawn in blocks, as the points are.
network = XORNetwork(100_000, 40, init_std=1e-9, generator=generator, device="meta")
run = DualGD(train, network, lr=1e-5).run(20, test)
print(run.to_frame().loc[[1, 2, 5, 20], ["train_accuracy", "test_accuracy", "odd_energy", "aligned"]])
print("labels fitted at step", run.fit_time, "and clusters learned at step", grokking_time(run, 0.9))

# The odd part of any model: all of a linear layer's output, and what ReLU adds is even.
x = data.load("digits").train.tensors[0].flatten(1)
torch.manual_seed(0)
for model in (nn.Linear(64, 10, bias=False), nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))):
    print(model, odd_energy(model, x))
