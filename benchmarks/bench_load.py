"""Loading a set of images that was decoded before: some of it, and all of it with the memory that takes.

The peer is what one writes by hand for arrays on disk: read them, shuffle the training part, scale to [0, 1], subtract
constants that are known and divide by others. `load` measures those constants on the training split and holds a validation
part out; all its splits are read. Run it with

    python benchmarks/bench_load.py [--data cifar10] [--rounds 5]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from torchfolio.data import DataSplits, load
from torchfolio.measure import alternate


def everything(name: str) -> DataSplits:
    splits = load(name)
    for part in (splits.train, splits.val, splits.test):
        assert len(part.tensors[0]) == len(part)
    return splits


def by_hand(folder: Path, mean: Tensor, std: Tensor) -> list[Tensor]:
    x, test = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in ("train", "test"))
    x = x[torch.randperm(len(x))]
    return [part.float().div_(255).sub_(mean).div_(std) for part in (x, test)]


def peak(name: str) -> float:
    """The most memory, in MB, that loading everything takes above what the process took before."""
    code = (
        "import sys, torch; from bench_load import everything, memory; torch.set_num_threads(1)\n"
        "everything('digits'); before = memory('RssAnon'); open('/proc/self/clear_refs', 'w').write('5')\n"
        "files = memory('RssFile'); splits = everything(sys.argv[1]); print(memory('VmHWM') - before - files)"
    )
    command = [sys.executable, "-c", code, name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout)


def memory(kind: str) -> float:
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="a set of images")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = everything(arguments.data)  # decoded by now
    seconds = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        load(arguments.data, train_size=1000)
        seconds.append(time.perf_counter() - start)
    print(f"{arguments.data}, 1,000 images to train on: {1e3 * median(seconds):.0f} ms")
    mean, std = (values.view(1, -1, 1, 1) for values in (splits.mean, splits.std))
    size = sum(part.tensors[0].nbytes for part in (splits.train, splits.val, splits.test)) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        shuffled = torch.cat([splits.denormalize(part.tensors[0]) for part in (splits.train, splits.val)])
        np.save(Path(folder) / "train.npy", shuffled.mul_(255).round_().byte().numpy())
        np.save(Path(folder) / "test.npy", splits.denormalize(splits.test.tensors[0]).mul_(255).round_().byte().numpy())
        del splits, shuffled
        hand = lambda: by_hand(Path(folder), mean, std)  # noqa: E731
        print(alternate(ours=lambda: everything(arguments.data), hand=hand, repeats=arguments.rounds))
    most = peak(arguments.data)
    print(f"at most {most:.0f} MB of its own memory, {most / size:.2f} of the set's {size:.0f} MB")


if __name__ == "__main__":
    main()
