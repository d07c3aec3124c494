"""BaDExpert's scores of 10,000 inputs: one vectorised pass against a loop over inputs, and the three networks stacked.

The reference is `BaDExpert.score`, three forward passes in large batches and one vectorised formula. The floor is the
one forward pass of a network without a filter. `loop` computes the formula input by input on Python numbers, as the
authors' code does, after the same forward passes. `stacked` runs the three networks at once by `torch.func` and `vmap`.
Run it with

    python benchmarks/bench_badexpert.py [--inputs 10000] [--rounds 5]

Measured with 10,000 inputs and 3 rounds on a shared machine (one thread, torch 2.13, a SmallConvNet of width 8 on 28x28
images), time over that of `score`, median and quartiles:

    floor 0.31 (0.31-0.37), loop 1.01 (0.99-1.10), stacked 2.07 (1.90-2.29), formula alone 0.00004

So the forward passes are nearly all of the time, the loop makes no difference that this shows, and stacking the networks
is slower on a CPU, which is why `score` does not.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from torchfolio.backdoor.badexpert import BaDExpert, suspicion
from torchfolio.backdoor.zoo import SmallConvNet
from torchfolio.measure import alternate


def fitted(x: Tensor) -> BaDExpert:
    """A detector whose networks are random: what they say does not matter here."""
    torch.manual_seed(0)
    net = SmallConvNet(1, 10, width=8).eval()
    y = net(x).argmax(1)
    y[:8] = torch.arange(8)
    return BaDExpert(unlearn_lr=1e-5, stop_acc=0.0, finetune_epochs=1, fpr=0.05).fit(net, (x, y))


def looped(detector: BaDExpert, x: Tensor) -> Callable[[], list[float]]:
    """The score of one input after the other."""

    def run() -> list[float]:
        b, m, _ = detector.confidences(x)
        found = []
        for k in range(len(x)):
            expert, auxiliary = b[k].item(), m[k].item()
            found.append(-min(2 * auxiliary / max(expert, 1e-8), (1 - expert) / max(0.5 - auxiliary, 1e-8)))
        return found

    return run


def stacked(nets: list[nn.Module], x: Tensor, batch: int = 512) -> Callable[[], Tensor]:
    """Outputs of all networks at once, `[3, N, C]`."""
    parameters, buffers = stack_module_state([net.eval() for net in nets])
    base = copy.deepcopy(nets[0]).to("meta").eval()

    def one(p: dict[str, Tensor], b: dict[str, Tensor], part: Tensor) -> Tensor:
        return functional_call(base, (p, b), (part,))

    every = torch.vmap(one, in_dims=(0, 0, None))

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat([every(parameters, buffers, part) for part in x.split(batch)], 1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.rand(options.inputs, 1, 28, 28)
    detector = fitted(x[:300])
    assert detector.auxiliary_ is not None
    nets = [detector.model_, detector.expert_, detector.auxiliary_]
    loop, together = looped(detector, x), stacked(nets, x)
    torch.testing.assert_close(torch.tensor(loop(), dtype=torch.float64), detector.score(x))
    with torch.no_grad():
        torch.testing.assert_close(together()[1][:64], detector.expert_.eval()(x[:64]), atol=1e-4, rtol=1e-3)

    @torch.no_grad()
    def plain() -> Tensor:
        return torch.cat([nets[0](part) for part in x.split(512)])

    def score() -> Tensor:
        return detector.score(x)

    b, m, _ = detector.confidences(x)

    def formula() -> Tensor:
        return suspicion(b, m)

    print(alternate(score=score, floor=plain, loop=loop, stacked=together, formula=formula, repeats=options.rounds))


if __name__ == "__main__":
    main()
