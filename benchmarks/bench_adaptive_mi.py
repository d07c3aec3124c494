"""Time of the estimates for a layer of 10 units and 4,096 inputs, and of training an ensemble, against one at a time.

Peers: rows as Python tuples in a `Counter`, as the codes of the field count symbols; a kernel estimate that makes a matrix of
distances from differences of all pairs at once; and the members of an ensemble trained by `fit` one after the other.

    python benchmarks/bench_adaptive_mi.py [--rounds 5]

Measured on one thread of a small cloud CPU that did other work too, medians of paired ratios: counting by tuples takes 9 times
as long (2.6 to 13), the matrix of all pairs 3.1 times, and training one by one 3.4 times (2.9 to 4.3).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.engine import fit, fit_many
from torchfolio.insight.adaptive_mi import AdaptiveBinning, joint_entropy, kde_information
from torchfolio.measure import alternate
from torchfolio.models import MLP


def counted(codes: Tensor) -> float:
    p = np.array(list(Counter(map(tuple, codes.tolist())).values())) / len(codes)
    return float(-(p * np.log2(p)).sum())


def all_pairs(t: Tensor, variance: float) -> float:
    distance = (t[:, None] - t[None]).square().sum(2)
    return float(-(torch.exp(-distance / (2 * variance)).mean(1).log2()).mean())


def nets(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [MLP(12, 2, (10, 7, 5, 4, 3), activation="tanh") for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(4096, 10, generator=generator).tanh()
    codes = AdaptiveBinning(30).codes(t)
    assert math.isclose(joint_entropy(codes), counted(codes))
    symbols: dict[str, Any] = {"packed": lambda: joint_entropy(codes), "counter": lambda: counted(codes)}
    print("symbols of 4,096 rows")
    print(alternate(**symbols, repeats=arguments.rounds))
    part = t[:1024].double()
    kernels: dict[str, Any] = {
        "by_rows": lambda: kde_information(part, 1e-3),
        "all_pairs": lambda: all_pairs(part, 1e-3),
    }
    print("kernel estimate of 1,024 rows")
    print(alternate(**kernels, repeats=arguments.rounds))
    x, y = torch.randint(2, (3277, 12), generator=generator).float(), torch.randint(2, (3277,), generator=generator)

    def one_by_one() -> None:
        for net in nets(5):
            adam = partial(torch.optim.Adam, lr=4e-4)
            fit(net, (x, y), optimizer=adam, epochs=2, batch_size=256, progress=False)

    together: Callable[[], Any] = lambda: fit_many(  # noqa: E731
        nets(5), x, y, steps=26, lr=4e-4, optimizer="adam", batch_size=256
    )
    training: dict[str, Any] = {"together": together, "one_by_one": one_by_one}
    print("two epochs of five networks")
    print(alternate(**training, repeats=arguments.rounds))


if __name__ == "__main__":
    main()
