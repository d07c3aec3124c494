"""One network made smaller by every compression: bytes, operations, accuracy and time, beside rounding without training.

A network of four convolutions on the embedded digits is trained, once for each seed; each method gets its own copy, the same data
and as many passes over them. Rounding to a number of bits, weight by weight with a scale for each output channel and no training,
is what anybody can do without a method. It writes the table and the picture of docs/make_smaller.md. Run it with

    python benchmarks/make_smaller.py [--data digits] [--epochs 20] [--seeds 3] [--output docs]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import advice
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

from torchfolio.data import DataSplits, load
from torchfolio.efficiency import BiPer
from torchfolio.efficiency.compression import Compression, Phase, compress, tensor_bytes
from torchfolio.efficiency.double_rounding import BitSwitching, use_bits
from torchfolio.efficiency.ftwt import DynamicPruning
from torchfolio.engine import evaluate, fit, seeded
from torchfolio.engine.recipes import adam, cosine
from torchfolio.measure import count_flops


def network(data: DataSplits) -> nn.Sequential:
    """Four convolutions, two of them of stride 2, and a linear head."""
    layers: list[nn.Module] = []
    channels = data.shape[0]
    for width, stride in ((32, 1), (32, 2), (64, 1), (64, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, data.num_classes))


class Further(Compression):
    """No method at all: as much further training as the methods get."""

    def convert(self, model: nn.Module, example: Tensor) -> nn.Module:
        return model

    def phases(self, model: nn.Module) -> Iterator[Phase]:
        yield Phase("train")

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        return network


def rounded(net: nn.Module, bits: int) -> nn.Module:
    """A copy whose weights are multiples of a step for each output channel, as many as the bits can count."""
    made = copy.deepcopy(net)
    levels = 2 ** (bits - 1) - 1
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.data
            step = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1)) / levels
            layer.weight.data = (weight / step).round() * step
    return made


def rounded_bytes(net: nn.Module, bits: int) -> int:
    """Of the integers, a scale for each channel, and everything else in float32."""
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    scales = sum(layer.weight.shape[0] for layer in layers)
    return tensor_bytes(net) - 4 * weights + weights * bits // 8 + 4 * scales


def milliseconds(net: nn.Module, x: Tensor) -> float:
    """Shortest of five passes over 64 examples, for one of them."""
    taken = []
    with torch.no_grad():
        for _ in range(6):
            started = time.perf_counter()
            net(x)
            taken.append(time.perf_counter() - started)
    return 1000 * min(taken[1:]) / len(x)


def measure(data: DataSplits, epochs: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row for every network."""
    with seeded(seed):
        net = network(data)
    fit(net, data.train, optimizer=adam(2e-3), scheduler=cosine(), epochs=epochs, seed=seed, progress=False)
    x = data.test.tensors[0][:64]

    def row(
        name: str, made: nn.Module, size: int, method: Compression | None = None, training: int = 0
    ) -> dict[str, Any]:
        operations = {"flops": count_flops(made, x[:1])} if method is None else method.operations(made, x[:1])
        return {
            "network": name, "kB": round(size / 1024, 1), "times smaller": round(tensor_bytes(net) / size, 1),
            "accuracy, %": round(100 * evaluate(made, data.test)["accuracy"], 2),
            "floating-point operations": operations["flops"], "ms an example": round(milliseconds(made, x), 3),
            "epochs of training": training,
        }  # fmt: skip

    yield row("as trained, 32 bits", net, tensor_bytes(net))
    for bits in (8, 4, 2):
        yield row(f"rounded to {bits} bits", rounded(net, bits), rounded_bytes(net, bits))
    methods: dict[str, Compression] = {
        "trained further, 32 bits": Further(), "biper: one bit a weight": BiPer(), "ftwt: r = 0.9": DynamicPruning(r=0.9), "ftwt: r = 0.7": DynamicPruning(r=0.7),
    }  # fmt: skip
    for name, method in methods.items():
        made = compress(net, method, data.train, example=x, epochs=epochs, seed=seed).model
        yield row(name, made, tensor_bytes(made), method, epochs)
    switching = BitSwitching()
    made = compress(net, switching, data.train, example=x, epochs=epochs, seed=seed).model
    for bits in (8, 6, 4, 2):
        with use_bits(made, bits):
            yield row(f"double_rounding: {bits} bits, same bundle", made, tensor_bytes(made), switching, epochs)


def merged(seeds: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several seeds in one: the mean accuracy and its range, the shortest time, mean operations."""
    rows = []
    for same in zip(*seeds, strict=True):
        scores = [row["accuracy, %"] for row in same]
        own = {
            "accuracy, %": round(mean(scores), 1), "of its seeds": f"{min(scores):.1f} to {max(scores):.1f}",
            "ms an example": min(row["ms an example"] for row in same),
            "floating-point operations": round(mean(row["floating-point operations"] for row in same)),
        }  # fmt: skip
        rows.append({k: own.get(k, v) for k, v in {**same[0], **own}.items()})
    order = [
        "network",
        "kB",
        "times smaller",
        "accuracy, %",
        "of its seeds",
        "floating-point operations",
        "ms an example",
    ]
    return [{k: row[k] for k in (*order, "epochs of training")} for row in rows]


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against size; against operations."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for key, ax in zip(("kB", "floating-point operations"), axes, strict=True):
        for k, row in enumerate(rows):
            ax.plot(row[key], row["accuracy, %"], "so"[row["epochs of training"] > 0], color=f"C{k % 10}", ms=7,
                    mfc="none" if k >= 10 else None, label=row["network"])  # fmt: skip
        ax.set(xlabel=key, xscale="log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a named set of images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=advice.DOCS, help="a folder like docs/")
    arguments = parser.parse_args()
    seeds: list[list[dict[str, Any]]] = []
    for seed in range(arguments.seeds):
        seeds.append([])
        for row in measure(load(arguments.data), arguments.epochs, seed):
            print(row, flush=True)
            seeds[-1].append(row)
    rows = merged(seeds)
    advice.write("make_smaller", "python benchmarks/make_smaller.py", rows, draw(rows), arguments.output)


if __name__ == "__main__":
    main()
