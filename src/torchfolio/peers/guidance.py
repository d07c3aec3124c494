"""A step with guidance beside the same step written straight from the equation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.models import MLP, ResNetCIFAR
from torchfolio.runs.bench import Bench
from torchfolio.training.guidance import LAYERS, Guidance, layer_correspondence

__all__ = ["peers"]


def peers(bench: Bench) -> None:
    """A wide perceptron under a small residual network, eight pairs of layers; the plain step, too."""
    x, y = torch.randn(256, 3, 16, 16), torch.randint(10, (256,))

    def step(make: Callable[[nn.Module, nn.Module], Callable[[], Tensor]]) -> Callable[[], None]:
        torch.manual_seed(0)
        net, guide = MLP(768, 10, (512, 512, 512), norm="batch"), ResNetCIFAR(8, (8, 16, 32)).eval()
        loss, optimizer = make(net, guide), torch.optim.Adam(net.parameters(), lr=1e-3)

        def one() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return one

    def guided(net: nn.Module, guide: nn.Module, cached: bool = False) -> Callable[[], Tensor]:
        guidance = Guidance(net, guide, alpha=10.0)
        features = guidance.guide_features(x) if cached else None
        return lambda: F.cross_entropy(net(x), y) + guidance(x, features=features)

    def straight(net: nn.Module, guide: nn.Module) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            task, own = F.cross_entropy(net(x), y), _maps(net, x)
            with torch.no_grad():
                others = _maps(guide, x)
            pairs = layer_correspondence(len(others), len(own))
            return task + 10 * torch.stack([1 - _explicit_cka(own[j], others[i]) for i, j in pairs]).sum()

        return loss

    bench.compare(
        "guided step, 256 x 3x16x16, eight pairs", ours=step(guided), official_loop=step(straight),
        guide_cached=step(lambda net, guide: guided(net, guide, cached=True)),
        without_guidance=step(lambda net, guide: lambda: F.cross_entropy(net(x), y)),
    )  # fmt: skip


def _maps(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The layers' outputs by hooks of this call alone and a forward pass of its own."""
    seen: list[Tensor] = []
    layers = [m for m in network.modules() if isinstance(m, LAYERS)]

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output)

    handles = [m.register_forward_hook(keep) for m in layers]
    network(x)
    for handle in handles:
        handle.remove()
    return seen[:-1]


def _explicit_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA by centring matrices."""
    x, y = x.flatten(1), y.flatten(1)
    h = torch.eye(len(x)) - 1 / len(x)
    k, l = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return (k * l).sum() / (k.norm() * l.norm())
