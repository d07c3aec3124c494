"""Time of an epoch over NAB's data, stamped by index mask, against a data set that stamps one image at a time; and the floor.

10,000 colour images of 32x32 in batches of 128, flipped and stamped, without a network. The peer is a data set as one would
write it first, read by a `DataLoader`. The floor flips the batches and stamps nothing.

    python benchmarks/bench_nab.py [--images 10000] [--rounds 5]

Measured on one thread of a small cloud CPU that did other work too, medians of paired ratios to stamping by index: the loader
over whole batches 0.78 (0.74 to 1.02), one image at a time 1.25 (1.08 to 1.36), the floor 0.32. An epoch of training takes
many times as long as any of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchfolio.backdoor.nab import NAB, NABDataset, PrecomputedIsolator, PrecomputedRelabeler, Stamp
from torchfolio.data import CropFlip
from torchfolio.measure import alternate


class OneByOne(Dataset):
    """The same samples, each made on its own."""

    def __init__(self, data: NABDataset, x: Tensor) -> None:
        self.data, self.x = data, x

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i]
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
        return (self.data.stamp(x) if self.data.stamped[i] else x), self.data.pseudo_labels[i]


def exhaust(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    x, y = torch.rand(arguments.images, 3, 32, 32), torch.randint(10, (arguments.images,))
    mask = torch.rand(arguments.images) < 0.05
    flip = CropFlip(padding=0)
    nab = NAB(PrecomputedIsolator(mask), PrecomputedRelabeler((y + 1) % 10), Stamp(value="mean"), augment=flip)
    data = nab.prepare((x, y))

    def by_index() -> None:
        for rows in torch.randperm(len(x)).split(128):
            data.apply(flip(x[rows]), rows)

    calls: dict[str, Any] = {
        "by_index": by_index,
        "loader": lambda: exhaust(DataLoader(data, 128, shuffle=True)),
        "one_by_one": lambda: exhaust(DataLoader(OneByOne(data, x), 128, shuffle=True)),
        "floor": lambda: exhaust(flip(x[rows]) for rows in torch.randperm(len(x)).split(128)),
    }
    print(alternate(**calls, repeats=arguments.rounds))


if __name__ == "__main__":
    main()
