"""Overhead of `fit` with `Backprop` over a PyTorch loop written by hand, and what `fit_many` gains over one.

Both take the same steps from the same weights and end with the same weights, by SGD with momentum, in float32; calls are
timed in alternation with one thread. Parts:

- `large`: ResNet-20 on 20 batches of 128 images of CIFAR-10's shape, whole calls (1.03 wanted).
- `start`: what a call costs before its first step, in milliseconds above the loop's, on a network of 64-32-10 (2 wanted).
- `step`: a step of that network on batches of 32 and 128, starts taken out (1.25 wanted).
- `many`: `fit_many` with 16 networks against a loop over them, by the time of the loop; wide networks fill the machine
  one by one, so that it gains on small ones.

Run it with

    python benchmarks/bench_fit.py [--only step] [--rounds 15] [--device cpu]

It exits with 1 where a limit is missed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import fit, fit_many
from torchfolio.engine.loader import TensorBatches
from torchfolio.measure import alternate
from torchfolio.measure.timing import Alternation
from torchfolio.models import MLP, ResNetCIFAR

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, batches: Sequence[Tensor]) -> None:
    """Steps as anybody would write them."""
    optimizer = SGD(net.parameters())
    net.train()
    for rows in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()


def compare(start: nn.Module, x: Tensor, y: Tensor, batch_size: int, rounds: int) -> Alternation:
    """One epoch by hand and by `fit`, copies of the network included."""
    batches = TensorBatches([x], batch_size, seed=0).order(0).to(x.device).split(batch_size)
    nets: dict[str, nn.Module] = {}

    def hand() -> None:
        nets["hand"] = copy.deepcopy(start)
        by_hand(nets["hand"], x, y, batches)

    def fitted() -> None:
        nets["fit"] = copy.deepcopy(start)
        fit(nets["fit"], (x, y), optimizer=SGD, batch_size=batch_size, device=x.device, progress=False)

    times = alternate(hand=hand, fit=fitted, repeats=rounds)
    for a, b in zip(nets["hand"].parameters(), nets["fit"].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    return times


def large(device: torch.device, rounds: int) -> bool:
    x, y = torch.randn(20 * 128, 3, 32, 32, device=device), torch.randint(10, (20 * 128,), device=device)
    ratio = compare(ResNetCIFAR(20).to(device), x, y, 128, rounds).ratio("fit")
    print(f"ResNet-20, batches of 128: fit takes {ratio:.3f} of the loop's time")
    return ratio <= 1.03


def start(device: torch.device, rounds: int) -> bool:
    net, x, y = MLP(64, 10, hidden=(32,)).to(device), torch.randn(32, 64, device=device), torch.zeros(32).long()
    seconds = compare(net, x, y.to(device), 32, 10 * rounds).seconds
    above = 1e3 * median(a - b for a, b in zip(seconds["fit"], seconds["hand"], strict=True))
    print(f"64-32-10, one step: fit takes {above:.2f} ms more than the loop")
    return above <= 2


def step(device: torch.device, rounds: int) -> bool:
    net, ratios = MLP(64, 10, hidden=(32,)).to(device), []
    for size in (32, 128):
        x, y = torch.randn(401 * size, 64, device=device), torch.randint(10, (401 * size,), device=device)
        times = {n: compare(net, x[: n * size], y[: n * size], size, rounds) for n in (1, 401)}
        of = {n: median(times[401].seconds[n]) - median(times[1].seconds[n]) for n in ("hand", "fit")}
        ratios.append(of["fit"] / of["hand"])
        print(f"64-32-10, batches of {size}: a step of fit takes {ratios[-1]:.2f} of the loop's time")
    return max(ratios) <= 1.25


def many(device: torch.device, rounds: int) -> bool:
    for width, size, steps in ((256, 128, 20), (32, 32, 100), (8, 32, 100)):
        ratio = compare_many(width, size, steps, device, rounds).ratio("hand")
        name = f"16 networks of 64-{width}-{width}-10, batches of {size}"
        print(f"{name}: a loop over them takes {ratio:.2f} of fit_many's time")
    return True


def compare_many(width: int, size: int, steps: int, device: torch.device, rounds: int) -> Alternation:
    """One epoch of 16 networks, one after the other by hand and all by `fit_many`, copies included."""
    nets: list[nn.Module] = [MLP(64, 10, hidden=(width, width)).to(device) for _ in range(16)]
    x, y = torch.randn(steps * size, 64, device=device), torch.randint(10, (steps * size,), device=device)
    batches = TensorBatches([x], size, seed=0).order(0).to(device).split(size)
    trained: dict[str, list[nn.Module]] = {}

    def hand() -> None:
        trained["hand"] = copy.deepcopy(nets)
        for net in trained["hand"]:
            by_hand(net, x, y, batches)

    def together() -> None:
        trained["many"] = copy.deepcopy(nets)
        fit_many(trained["many"], x, y, steps=steps, lr=0.01, momentum=0.9, batch_size=size)

    times = alternate(many=together, hand=hand, repeats=rounds)
    for one, other in zip(*trained.values(), strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    return times


PARTS = {"large": large, "start": start, "step": step, "many": many}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    chosen = [arguments.only] if arguments.only else list(PARTS)
    kept = [PARTS[name](device, arguments.rounds) for name in chosen]
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
