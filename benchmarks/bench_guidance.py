"""Time of a guided training step against the plain step, and against guidance written straight from the equation.

A wide perceptron (768 to 3 x 512, batch norm) under a small residual network, 16x16 colour images, batch 256, eight
pairs of layers. The peer does what a first implementation does: it runs the target once for its logits and once more
for its features, hooks the networks anew at every step, and centres every Gram matrix by multiplying with
$H = I - 11^\\top / n$ from both sides.

    python benchmarks/bench_guidance.py [--batch 256] [--rounds 15]

Measured on one thread of a small cloud CPU that did other work too, medians of paired ratios: the peer takes 1.4 times as
long (1.32 to 1.58). Cached guide features bring a guided step to 0.73 of its time, by the rule it takes 0.99; the plain
step is 0.27 of a guided one. The Gram matrices of this small target's guide are what remains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.measure import alternate, linear_cka
from torchfolio.models import MLP, ResNetCIFAR
from torchfolio.training.guidance import LAYERS, Guidance, GuidedRule, layer_correspondence


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return MLP(768, 10, (512, 512, 512), norm="batch"), ResNetCIFAR(8, (8, 16, 32)).eval()


def optimized(net: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def plain(x: Tensor, y: Tensor) -> Callable[[], None]:
    net, _ = networks()
    return optimized(net, lambda: F.cross_entropy(net(x), y))


def guided(x: Tensor, y: Tensor, cached: bool = False) -> Callable[[], None]:
    net, guide = networks()
    guidance = Guidance(net, guide, alpha=10.0)
    features = guidance.guide_features(x) if cached else None
    return optimized(net, lambda: F.cross_entropy(net(x), y) + guidance(x, features=features))


def by_rule(x: Tensor, y: Tensor) -> Callable[[], None]:
    net, guide = networks()
    rule = GuidedRule(Guidance(net, guide, alpha=10.0))
    rule.prepare(net, (x, y))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        rule.step((x, y), Tensor.backward)
        optimizer.step()

    return step


def straight(x: Tensor, y: Tensor) -> Callable[[], None]:
    net, guide = networks()

    def maps(network: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
            seen.append(output)

        handles = [m.register_forward_hook(keep) for m in network.modules() if isinstance(m, LAYERS)]
        network(x)
        for handle in handles:
            handle.remove()
        return seen[:-1]

    def loss() -> Tensor:
        task = F.cross_entropy(net(x), y)
        own = maps(net)
        with torch.no_grad():
            others = maps(guide)
        pairs = layer_correspondence(len(others), len(own))
        return task + 10 * torch.stack([1 - explicit_cka(own[j], others[i]) for i, j in pairs]).sum()

    return optimized(net, loss)


def explicit_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA by centring matrices."""
    x, y = x.flatten(1), y.flatten(1)
    h = torch.eye(len(x)) - 1 / len(x)
    k, l = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return (k * l).sum() / (k.norm() * l.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.randn(arguments.batch, 3, 16, 16), torch.randint(10, (arguments.batch,))
    steps: dict[str, Any] = {
        "guided": guided(x, y),
        "straight": straight(x, y),
        "rule": by_rule(x, y),
        "cached": guided(x, y, cached=True),
        "plain": plain(x, y),
    }
    print(alternate(**steps, repeats=arguments.rounds))
    a, b = torch.randn(arguments.batch, 512), torch.randn(arguments.batch, 2048)
    print(alternate(cka=partial(linear_cka, a, b), explicit=partial(explicit_cka, a, b), repeats=arguments.rounds))


if __name__ == "__main__":
    main()
