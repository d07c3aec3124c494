"""Time of a step of mask training: flat buffers and joint passes, against dictionaries of tensors and a pass per task.

Three tasks, the network of the experiment, dual masks, batches of 32. The peer is the same step as a first
implementation writes it: masks, merged weights and moments by name, a pass through the network for every task, clean
and perturbed inputs apart.

    python benchmarks/bench_dam.py [--batch 32] [--rounds 15]

Measured on one thread of a small cloud CPU that did other work too: the peer takes 1.15 times as long (1.09 to 1.22). At
these sizes both are bound by the convolutions; the flat buffers save the Python between them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from torchfolio.adaptation.dam import DefenseAwareMerging
from torchfolio.adaptation.mask_training import MaskTraining
from torchfolio.adaptation.merging import TaskVectors, entropy, initial_weights, task_vectors
from torchfolio.measure import alternate

ALPHA, EPSILON, RATE, INNER, WEIGHT = 0.05, 0.15, 2e-2, 0.05, 0.7


def networks() -> tuple[nn.Module, Sequence[nn.Module], Sequence[nn.Module]]:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 128),
        nn.ReLU(),
    )  # fmt: skip
    tuned = [copy.deepcopy(base) for _ in range(3)]
    with torch.no_grad():
        for net in tuned:
            for p in net.parameters():
                p.add_(0.01 * torch.randn_like(p))
    return base, tuned, [nn.Linear(128, 10) for _ in range(3)]


def ours(inputs: list[Tensor]) -> Callable[[], None]:
    base, tuned, heads = networks()
    method = DefenseAwareMerging(
        alpha=ALPHA, epsilon=EPSILON, mask_lr=RATE, delta_lr=RATE, inner_lr=INNER, weight=WEIGHT
    )
    tasks = TaskVectors(base, tuned, heads=heads)
    training = MaskTraining(method, tasks, initial_weights(tasks, WEIGHT, False))

    def step() -> None:
        training.step(inputs, 0)

    return step


class Dictionaries:
    """The same step on dictionaries."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.base, tuned, self.heads = networks()
        self.inputs = inputs
        self.start = {name: p.detach() for name, p in self.base.named_parameters()}
        self.vectors = task_vectors(self.base, tuned)
        self.phis = [{n: torch.zeros_like(p, requires_grad=True) for n, p in self.start.items()} for _ in range(2)]
        self.optimizers = [torch.optim.Adam(list(phi.values()), lr=RATE) for phi in self.phis]
        self.deltas = [torch.zeros_like(x[0], requires_grad=True) for x in inputs]
        self.delta_optimizer = torch.optim.Adam(self.deltas, lr=RATE)

    def sample(self, phi: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = {}
        for name, value in phi.items():
            u = torch.rand_like(value).clamp(1e-6, 1 - 1e-6)
            m = torch.sigmoid((value + u.log() - torch.log1p(-u)) / 0.5)
            mask[name] = m / m.mean()
        return mask

    def logits(self, weights: Tensor, mask: dict[str, Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        merged = {}
        for name, value in self.start.items():
            for w, vector in zip(weights, self.vectors, strict=True):
                value = value + w * vector[name] * mask[name]
            merged[name] = value
        return [head(functional_call(self.base, merged, (x,))) for head, x in zip(self.heads, xs, strict=True)]

    def perturbed(self) -> list[Tensor]:
        return [(x + d).clamp(0, 1) for x, d in zip(self.inputs, self.deltas, strict=True)]

    def step(self) -> None:
        masks = [self.sample(phi) for phi in self.phis]
        fixed = {n: (masks[0][n] * masks[1][n]).detach() for n in self.start}
        weights = torch.full((len(self.vectors),), WEIGHT, requires_grad=True)
        loss = torch.stack([entropy(z) for z in self.logits(weights, fixed, self.inputs)]).sum()
        weights = (weights - INNER * torch.autograd.grad(loss, weights)[0]).detach()
        with torch.no_grad():
            labels = [z.argmax(-1) for z in self.logits(weights, fixed, self.inputs)]
        flips = self.logits(weights, fixed, self.perturbed())
        self.delta_optimizer.zero_grad()
        (-torch.stack([F.cross_entropy(z, y) for z, y in zip(flips, labels, strict=True)]).sum()).backward()
        self.delta_optimizer.step()
        with torch.no_grad():
            for delta in self.deltas:
                delta.clamp_(-EPSILON, EPSILON)
        for k, optimizer in enumerate(self.optimizers):
            held = {n: masks[k][n] * masks[1 - k][n].detach() for n in self.start}
            loss = torch.stack([entropy(z) for z in self.logits(weights, held, self.inputs)]).sum()
            if k:
                moved = self.logits(weights, held, [x.detach() for x in self.perturbed()])
                safe = torch.stack([F.cross_entropy(z, y) for z, y in zip(moved, labels, strict=True)]).sum()
                loss = loss + ALPHA * safe
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    inputs = [torch.rand(arguments.batch, 1, 28, 28) for _ in range(3)]
    steppers: dict[str, Any] = {"flat": ours(inputs), "dictionaries": Dictionaries(inputs).step}
    print(alternate(**steppers, repeats=arguments.rounds))


if __name__ == "__main__":
    main()
