"""Measures filter design: initialisation in depth, banks and learned filters on frozen features, number, size, choice."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import fit
from torchfolio.engine.recipes import sgd
from torchfolio.layers.filter_banks import Bank, dct_bank, gabor_bank, random_bank, wavelet_bank
from torchfolio.layers.filter_design import METHODS, FilterLearner, bench, filter_count, init_, select_filters
from torchfolio.layers.filter_learning import KMeans, Learner
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.runs.tasks import accuracy


@dataclass(frozen=True)
class Settings:
    """Sizes of the parts."""

    data: str = setting("cifar10", "photographs of the bench")
    deep: str = setting("mnist10k", "digits of the deep networks")
    train_size: int | None = setting(3000, "training images of both")
    test_size: int | None = setting(4000, "test images of the bench; its accuracies differ by little")
    image_size: int | None = setting(16, "side of the photographs; `None` keeps theirs")
    deep_size: int | None = setting(14, "side of the digits; `None` keeps theirs")
    depth: int = setting(14, "convolutions of the deep networks")
    epochs: int = setting(3, "passes over the digits")
    filters: int = setting(24, "filters of a bank, K")
    size: int = setting(5, "side of the filters")
    numbers: tuple[int, ...] = setting((4, 8, 16, 32, 64), "numbers of filters that are compared")
    sizes: tuple[int, ...] = setting((3, 5, 7, 9), "sides that are compared")
    draws: int = setting(3, "random banks whose scores are averaged")
    methods: tuple[str, ...] = setting(tuple(METHODS), "ways to learn filters")


SMALL: dict[str, Any] = {"train_size": 400, "test_size": None, "image_size": None, "deep_size": None}
SCALES = {
    "smoke": Settings("digits", "digits", **SMALL, depth=4, epochs=1, filters=8, size=3, numbers=(4, 8), sizes=(2, 3),
                      draws=1, methods=("kmeans", "ica", "sparse_coding", "wta", "pca")),
    "quick": Settings(),
    "full": Settings(train_size=20_000, test_size=None, image_size=None, filters=75, size=5, epochs=10),
}  # fmt: skip
INITIAL = ("gaussian", "lecun_1998", "xavier", "orthogonal", "he", "lsuv")
LEARNED = ("kmeans", "ica", "sparse_coding", "wta")


class Permuted(Learner):
    """The negative control: k-means on patches whose coordinates are permuted, each patch on its own."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        order = torch.rand(x.shape, generator=generator).argsort(1)
        return KMeans().learn(x.gather(1, order), K, generator)


class Centroids(KMeans):
    """k-means whose centroids keep their length."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        return self.centroids(x, K, generator)


def deep(run: Run[Settings], data: DataSplits, scheme: str) -> dict[str, float]:
    """A deep plain network: standard deviations of its first and last outputs before training, and accuracy."""
    s = run.settings
    widths = (data.shape[0], *[12] * s.depth)
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    net = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.ReLU())),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, data.num_classes))  # fmt: skip
    x = data.train.tensors[0][:256]
    init_(net[:-1], scheme, data=x, generator=run.generator())
    with torch.no_grad():
        stds, signal = [], x
        for conv in convolutions:
            signal = conv(signal)
            stds.append(float(signal.std()))
            signal = signal.relu()
    fit(net, data.train, optimizer=sgd(0.02, nesterov=False), epochs=s.epochs, batch_size=64, clip_norm=5.0,
        seed=run.seed, device=run.device, progress=False)  # fmt: skip
    return {"accuracy": accuracy(net, data.test), "first": stds[0], "ratio": stds[-1] / stds[0]}


def score(bank: Bank, data: DataSplits, seed: int, whiten: bool = True) -> dict[str, Any]:
    """Accuracy, redundancy and seconds of one bank."""
    train, test = data.train.tensors, data.test.tensors
    row = bench(bank, train, test, whiten=whiten, seed=seed).iloc[0]  # pyright: ignore[reportArgumentType]
    return {name: float(row[name]) for name in ("accuracy", "redundancy", "seconds")} | {"filters": bank.filters}


def learned(run: Run[Settings], data: DataSplits, method: Any, K: int = 0, size: int = 0, **others: Any) -> Bank:
    """Filters learned from the training images."""
    s = run.settings
    learner = FilterLearner(method, K or s.filters, size or s.size, random_state=run.seed, **others)
    return learner.fit(data.train.tensors[0]).bank_


def one(run: Run[Settings], data: DataSplits, method: Any, K: int = 0, size: int = 0, **others: Any) -> dict[str, Any]:
    """`score` of learned filters; images are not whitened where the method does not ask for it."""
    return score(learned(run, data, method, K, size, **others), data, run.seed, others.get("whiten", True))


def at_random(run: Run[Settings], data: DataSplits, K: int = 0, size: int = 0, **others: Any) -> dict[str, Any]:
    """`score` of random banks, on average."""
    s = run.settings
    seeds = [100 * run.seed + k for k in range(s.draws)]
    banks = [random_bank(K or s.filters, size or s.size, data.shape[0], seed=k, **others) for k in seeds]
    found = [score(bank, data, run.seed) for bank in banks]
    return found[0] | {name: float(np.mean([f[name] for f in found])) for name in ("accuracy", "redundancy", "seconds")}


def chosen(run: Run[Settings], data: DataSplits) -> dict[str, float]:
    """A quarter of twice as many k-means filters, chosen in every way, and at random."""
    s = run.settings
    bank, (x, y) = learned(run, data, "kmeans", 2 * s.filters), data.train.tensors
    n, order = s.filters // 2, run.generator()
    found = {}
    for method in ("joint", "marginal", "spectral", "redundancy"):
        indices, _ = select_filters(bank, x, y, method, n)  # pyright: ignore[reportArgumentType]
        found[method] = score(bank.take(indices), data, run.seed)["accuracy"]
    draws = [bank.take(torch.randperm(len(bank), generator=order)[:n]) for _ in range(6)]
    return found | {"random": float(np.mean([score(b, data, run.seed)["accuracy"] for b in draws]))}


def blank(run: Run[Settings], data: DataSplits) -> dict[str, int]:
    """Centroids of k-means on digits near zero (a tenth of the longest), with and without leaving out blank patches."""
    found = {}
    for name, drop in (("dropped", True), ("kept", False)):
        learner = FilterLearner(Centroids(), 8, 5, drop_blank=drop, random_state=run.seed).fit(data.train.tensors[0])
        norms = learner.bank_.filters.flatten(1).norm(dim=1)
        found[name] = int((norms < 0.1 * norms.max()).sum())
    return found


def run(run: Run[Settings]) -> None:
    """Depth, bench, number and size of filters, choice, controls."""
    s = run.settings
    digits = run.data(s.deep, train_size=s.train_size, image_size=s.deep_size)
    nets = {scheme: run.arm(f"depth {scheme}", deep, run, digits, scheme) for scheme in INITIAL}
    run.values(
        "depth",
        {f"{n}_accuracy": nets[n]["accuracy"] for n in INITIAL} | {f"{n}_ratio": nets[n]["ratio"] for n in INITIAL},
    )
    data = run.data(s.data, train_size=s.train_size, test_size=s.test_size, image_size=s.image_size, normalize=False)
    table = {"random": run.arm("bench random", at_random, run, data)}
    table["orthogonal"] = run.arm("bench orthogonal", at_random, run, data, orthogonal=True)
    C = data.shape[0]
    K = min(s.filters, C * s.size**2)
    fixed = {"dct": dct_bank(s.size, C, K), "gabor": gabor_bank(s.size, C), "wavelet": wavelet_bank(s.size, C)}
    for name, bank in fixed.items():
        table[name] = run.arm(f"bench {name}", score, bank, data, run.seed)
    for name in s.methods:
        table[name] = run.arm(f"bench {name}", one, run, data, name)
    scores = {name: arm["accuracy"] for name, arm in table.items()}
    run.values("learned_filters", scores)
    for K in s.numbers:
        run.arm(f"random {K}", at_random, run, data, K)
        run.arm(f"kmeans {K}", one, run, data, "kmeans", K)
    gaps = [run.arms[f"kmeans {K}"]["accuracy"] - run.arms[f"random {K}"]["accuracy"] for K in s.numbers if K >= 8]
    few, many = (run.arms[f"kmeans {K}"]["accuracy"] for K in (s.numbers[0], s.numbers[-1]))
    run.values("more_filters", few=few, many=many, least_gap=min(gaps))
    for size in s.sizes:
        counts = filter_count(data.train.tensors[0], size, seed=run.seed)
        run.arm(f"size {size}", lambda size=size, counts=counts: one(run, data, "kmeans", size=size) | counts)
    run.values("selection", run.arm("selection", chosen, run, data))
    permuted = run.arm("permuted", one, run, data, Permuted())
    plain = run.arm("unwhitened", one, run, data, "kmeans", whiten=False)
    empty = run.arm("blank", blank, run, run.data(s.deep, train_size=s.train_size, normalize=False))
    run.values("negative_control", permuted=permuted["accuracy"], random=scores["random"], kmeans=scores["kmeans"],
               unwhitened=plain["accuracy"], blank_kept=empty["kept"], blank_dropped=empty["dropped"])  # fmt: skip


def figures(results: Results) -> plots.Figures:
    """The bench over all banks, and accuracy by number and size of filters."""
    s = results.settings
    names = ("random", "orthogonal", "dct", "gabor", "wavelet", *s.methods)
    numbers = {kind: [(f"{kind} {K}", "accuracy") for K in s.numbers] for kind in ("random", "kmeans")}
    sizes = {"kmeans": [(f"size {size}", "accuracy") for size in s.sizes]}
    return {
        "bench": plots.bars(results, {n.replace("_", " "): (f"bench {n}", "accuracy") for n in names},
                            ylabel="test accuracy (%)"),
        "number": plots.curves(results, numbers, x=s.numbers, xlabel="number of filters", ylabel="test accuracy (%)"),
        "size": plots.curves(results, sizes, x=s.sizes, xlabel="size of filters", ylabel="test accuracy (%)"),
    }  # fmt: skip
