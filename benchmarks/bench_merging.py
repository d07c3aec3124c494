"""Merging three checkpoints: task arithmetic and the mean, beside loops written by hand and the functions of FusionBench.

Checkpoints of transformers of 20 and 95 million parameters in float32, in memory and in safetensors files. Peers: `hand`,
what one writes in a few lines, in place: `out.add_(task - base, alpha=weight)` on a copy of the base, `out.add_(other)` and
`out.div_(3)` for the mean; `fusion_bench`, dictionaries of task vectors that are added up, scaled and added to the base,
each tensor in place where that package works in place. Every call begins with freed memory handed back to the system, as
the one call of a user does. Peak memory is that of a fresh process, above what the checkpoints take. Run it with

    python benchmarks/bench_merging.py [--millions 20] [--rounds 9]
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchfolio.adaptation.merge_files import average_files, task_arithmetic_files
from torchfolio.adaptation.weights import average, task_arithmetic
from torchfolio.measure import alternate

State = dict[str, Tensor]
SIZES = {20: (384, 10, 6000), 95: (768, 12, 13_000)}
"""Width, layers and words, by millions of parameters."""


def checkpoint(millions: int, seed: int) -> State:
    """Weights of a transformer."""
    width, layers, words = SIZES[millions]
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (words, width)}
    for i in range(layers):
        shapes |= {f"{i}.attention": (3 * width, width), f"{i}.out": (width, width), f"{i}.norm": (width,)}
        shapes |= {f"{i}.up": (4 * width, width), f"{i}.down": (width, 4 * width)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def hand_task_arithmetic(base: State, tasks: list[State], weight: float = 0.3) -> State:
    merged = {name: value.clone() for name, value in base.items()}
    for name, value in merged.items():
        for task in tasks:
            value.add_(task[name] - base[name], alpha=weight)
    return merged


def fusion_bench_task_arithmetic(base: State, tasks: list[State], weight: float = 0.3) -> State:
    total: State = {}
    for task in tasks:
        vector = {name: task[name] - base[name] for name in base}
        total = {name: total[name].add_(vector[name]) for name in base} if total else vector
    return {name: value.mul_(weight).add_(base[name]) for name, value in total.items()}


def hand_average(tasks: list[State]) -> State:
    merged = {name: value.clone() for name, value in tasks[0].items()}
    for name, value in merged.items():
        for task in tasks[1:]:
            value.add_(task[name])
        value.div_(len(tasks))
    return merged


def fusion_bench_average(tasks: list[State]) -> State:
    total = {name: value.clone() for name, value in tasks[0].items()}
    for task in tasks[1:]:
        total = {name: value.add_(task[name]) for name, value in total.items()}
    return {name: value.div_(len(tasks)) for name, value in total.items()}


def cold(f: Callable[[], object]) -> Callable[[], None]:
    """A call that finds no memory left by the one before, and whose result is gone after it."""
    libc = ctypes.CDLL(None)

    def call() -> None:
        f()
        getattr(libc, "malloc_trim", lambda _: None)(0)

    return call


def times(millions: int, rounds: int) -> None:
    base, *tasks = (checkpoint(millions, seed) for seed in range(4))
    torch.testing.assert_close(task_arithmetic(base, tasks), hand_task_arithmetic(base, tasks))
    torch.testing.assert_close(average(tasks), hand_average(tasks))
    print(f"\n{millions} M parameters, task arithmetic and mean in memory")
    ours, hand, peer = (
        cold(lambda f=f: f(base, tasks)) for f in (task_arithmetic, hand_task_arithmetic, fusion_bench_task_arithmetic)
    )
    print(alternate(ours=ours, hand=hand, fusion_bench=peer, repeats=rounds))
    ours, hand, peer = (cold(lambda f=f: f(tasks)) for f in (average, hand_average, fusion_bench_average))
    print(alternate(ours=ours, hand=hand, fusion_bench=peer, repeats=rounds))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.safetensors" for k in range(4)]
        for path, state in zip(paths, (base, *tasks), strict=True):
            save_file(state, path)
        base, tasks = {}, []

        def read() -> None:
            states = [load_file(path) for path in paths]
            save_file(hand_task_arithmetic(states[0], states[1:]), Path(folder) / "hand")

        print(f"{millions} M parameters, task arithmetic from file to file")
        files = cold(lambda: task_arithmetic_files(paths[0], paths[1:], Path(folder) / "ours"))
        print(alternate(ours=files, hand=cold(read), repeats=max(3, rounds // 3)))


WAYS: dict[str, Callable[..., object]] = {
    "task_arithmetic": lambda base, tasks: task_arithmetic(base, tasks),
    "average": lambda _, tasks: average(tasks),
    "fusion_bench": fusion_bench_task_arithmetic,
    "task_arithmetic_files": lambda paths, out: task_arithmetic_files(paths[0], paths[1:], out),
    "average_files": lambda paths, out: average_files(paths, out),
}


def anonymous() -> float:
    """Memory of this process in MB that is no page of a file."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1e3 if found else float("nan")


def peak(way: str, millions: int, folder: Path) -> None:
    """Print the peak of one way to merge above what was there before, in MB; called in a process of its own."""
    paths = [folder / f"{k}.safetensors" for k in range(4)]
    if way.endswith("files"):
        arguments: tuple = (paths, folder / "out")
    else:
        base, *tasks = (checkpoint(millions, seed) for seed in range(4))
        arguments = (base, tasks)
    small = {name: value[:1].clone() for name, value in load_file(paths[0]).items()}
    save_file(small, folder / "small")
    WAYS[way](*(([folder / "small"] * 3, folder / "out") if way.endswith("files") else (small, [small] * 3)))
    before, highest, over = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            highest[0] = max(highest[0], anonymous() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = WAYS[way](*arguments)
    highest[0] = max(highest[0], anonymous() - before)
    over.set()
    watcher.join()
    del kept
    print(highest[0])


def peaks(millions: int) -> None:
    states = [checkpoint(millions, seed) for seed in range(4)]
    sizes = [value.nbytes / 1e6 for value in states[0].values()]
    print(f"\n{millions} M parameters: a checkpoint has {sum(sizes):.0f} MB, its largest tensor {max(sizes):.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        for k, state in enumerate(states):
            save_file(state, Path(folder) / f"{k}.safetensors")
        states.clear()
        for way in WAYS:
            command = [sys.executable, __file__, "--peak", way, "--millions", str(millions), "--folder", folder]
            most = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{way:>22}: {most:6.0f} MB, {most / sum(sizes):.2f} checkpoints, {most / max(sizes):.2f} tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, choices=SIZES, help="only this size")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        return peak(arguments.peak, arguments.millions, arguments.folder)
    for millions in [arguments.millions] if arguments.millions else SIZES:
        times(millions, arguments.rounds)
        peaks(millions)
    return None


if __name__ == "__main__":
    main()
