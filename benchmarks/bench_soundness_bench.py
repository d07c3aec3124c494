"""Time of a training step of SoundnessBench: one batch and a ring of memory, against the arrangement of a script.

The experiment's sizes: 10 centres, 12 steps of PGD from 24 starts, a window of 100. The peer attacks once per start, and
keeps the window as a list that it joins anew in every step. The floor is the forward and backward passes of the attack alone.

    python benchmarks/bench_soundness_bench.py [--rounds 9]

Measured on one thread of a small cloud CPU that did other work too: the peer takes 8.6 times as long (8.4 to 13). The attack
alone is 0.42 of a step; what else a step does is mostly the forward and backward pass over the window.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.measure import alternate
from torchfolio.models import MLP
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.soundness_bench import HiddenCounterexamples, Pairs, PgdSettings, draw_pairs

STEPS, RESTARTS, WINDOW = 12, 24, 100


def network() -> nn.Module:
    torch.manual_seed(0)
    return MLP(10, 2, (128, 128, 128, 20))


def ours(pairs: Pairs) -> Callable[[], None]:
    net = network()
    rule = HiddenCounterexamples(pairs, window=WINDOW, attack=PgdSettings(STEPS, RESTARTS))
    rule.prepare(net, pairs.all())

    def step() -> None:
        net.zero_grad(set_to_none=True)
        rule.step((), Tensor.backward)

    for _ in range(WINDOW):
        step()
    return step


def script(pairs: Pairs) -> Callable[[], None]:
    net = network()
    x, y = pairs.all()
    window: list[Tensor] = [x.clone() for _ in range(WINDOW)]

    def attack() -> Tensor:
        best, value = x.clone(), torch.full((len(x),), -torch.inf)
        for _ in range(RESTARTS):
            found = pgd(
                net, x, y, eps=pairs.eps, alpha=0.1 * pairs.eps, steps=STEPS, loss="sum_margin", clip=pairs.clip
            )
            better = found.loss > value
            best[better], value[better] = found.x_adv[better], found.loss[better]
        return best

    def step() -> None:
        net.zero_grad(set_to_none=True)
        window.append(attack())
        del window[0]
        z = net(pairs.counterexamples)
        gap = z.gather(1, pairs.labels[:, None]) - z.gather(1, pairs.targets[:, None])
        seen = torch.cat(window)
        (F.relu(gap + 0.01).mean() + F.cross_entropy(net(seen), y.repeat(WINDOW))).backward()

    return step


def floor(pairs: Pairs) -> Callable[[], None]:
    net = network().requires_grad_(False)
    x, y = pairs.all()
    many, labels = x.repeat(RESTARTS, 1), y.repeat(RESTARTS)

    def step() -> None:
        for _ in range(STEPS):
            at = many.clone().requires_grad_()
            z = net(at)
            torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum"), at)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    pairs = draw_pairs((10,), 5, 0.2, 1.0, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Any] = {"ours": ours(pairs), "script": script(pairs), "floor_of_the_attack": floor(pairs)}
    print(alternate(**calls, repeats=arguments.rounds))


if __name__ == "__main__":
    main()
