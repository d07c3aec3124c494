"""Measures filter design: initialisation in depth, banks and learned filters on frozen features, number, size, choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchfolio.data import DataSplits
from torchfolio.experiments._blank_patches import near_zero
from torchfolio.experiments._deep_plain_networks import deep
from torchfolio.layers.filter_banks import Bank, dct_bank, gabor_bank, random_bank, wavelet_bank
from torchfolio.layers.filter_design import METHODS, FilterLearner, bench, filter_count, select_filters
from torchfolio.layers.filter_learning import KMeans, Learner
from torchfolio.runs import Results, Run, column, pick, plots, setting


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
FIXED = ("random", "orthogonal", "dct", "gabor", "wavelet")
SCORES = ("accuracy", "redundancy", "seconds")


class Permuted(Learner):
    """The negative control: k-means on patches whose coordinates are permuted, each patch on its own."""

    def learn(self, x: Tensor, K: int, generator: torch.Generator) -> Tensor:
        order = torch.rand(x.shape, generator=generator).argsort(1)
        return KMeans().learn(x.gather(1, order), K, generator)


class Bench:
    """Banks of filters and how they score on the photographs."""

    def __init__(self, run: Run[Settings], data: DataSplits) -> None:
        self.run, self.settings, self.data = run, run.settings, data

    def score(self, bank: Bank, whiten: bool = True) -> dict[str, Any]:
        """Accuracy, redundancy and seconds of one bank."""
        parts: Any = self.data.train.tensors, self.data.test.tensors
        row: Any = bench(bank, *parts, whiten=whiten, seed=self.run.seed).iloc[0]
        return {name: float(row[name]) for name in SCORES} | {"filters": bank.filters}

    def bank(self, method: Any, K: int | None = None, size: int | None = None, **others: Any) -> Bank:
        """Filters learned from the training images, as many and as large as the settings say unless given."""
        s = self.settings
        learner = FilterLearner(method, K or s.filters, size or s.size, random_state=self.run.seed, **others)
        return learner.fit(self.data.train.tensors[0]).bank_

    def learned(self, method: Any, whiten: bool = True, **others: Any) -> dict[str, Any]:
        """`score` of learned filters; images are not whitened where patches are not."""
        return self.score(self.bank(method, whiten=whiten, **others), whiten)

    def random(self, K: int | None = None, **others: Any) -> dict[str, Any]:
        """`score` of random banks, on average."""
        s, channels = self.settings, self.data.shape[0]
        seeds = [100 * self.run.seed + k for k in range(s.draws)]
        scores = [self.score(random_bank(K or s.filters, s.size, channels, seed=seed, **others)) for seed in seeds]
        return scores[0] | {name: column(scores, name).mean() for name in SCORES}

    def chosen(self) -> dict[str, float]:
        """A quarter of twice as many k-means filters, chosen in every way, and at random."""
        bank, (x, y) = self.bank("kmeans", 2 * self.settings.filters), self.data.train.tensors
        n, order = self.settings.filters // 2, self.run.generator()
        ways: tuple[Any, ...] = ("joint", "marginal", "spectral", "redundancy")
        found = {way: self.score(bank.take(select_filters(bank, x, y, way, n)[0]))["accuracy"] for way in ways}
        draws = [self.score(bank.take(torch.randperm(len(bank), generator=order)[:n])) for _ in range(6)]
        return found | {"random": column(draws, "accuracy").mean()}


def run(run: Run[Settings]) -> None:
    """Depth, bench, number and size of filters, choice, controls."""
    s = run.settings
    digits = run.data(s.deep, train_size=s.train_size, image_size=s.deep_size)
    nets = {scheme: run.arm(f"depth {scheme}", deep, run, digits, scheme) for scheme in INITIAL}
    run.values("depth", {f"{n}_{value}": nets[n][value] for value in ("accuracy", "ratio") for n in INITIAL})
    data = run.data(s.data, train_size=s.train_size, test_size=s.test_size, image_size=s.image_size, normalize=False)
    scene, C = Bench(run, data), data.shape[0]
    run.arm("bench random", scene.random)
    run.arm("bench orthogonal", scene.random, orthogonal=True)
    dct = dct_bank(s.size, C, min(s.filters, C * s.size**2))
    for name, bank in {"dct": dct, "gabor": gabor_bank(s.size, C), "wavelet": wavelet_bank(s.size, C)}.items():
        run.arm(f"bench {name}", scene.score, bank)
    for method in s.methods:
        run.arm(f"bench {method}", scene.learned, method)
    scores = {name: run.arms[f"bench {name}"]["accuracy"] for name in (*FIXED, *s.methods)}
    run.values("learned_filters", scores)
    random = {K: run.arm(f"random {K}", scene.random, K)["accuracy"] for K in s.numbers}
    kmeans = {K: run.arm(f"kmeans {K}", scene.learned, "kmeans", K=K)["accuracy"] for K in s.numbers}
    gap = min(kmeans[K] - random[K] for K in s.numbers if K >= 8)
    run.values("more_filters", few=kmeans[s.numbers[0]], many=kmeans[s.numbers[-1]], least_gap=gap)
    for size in s.sizes:
        counts = filter_count(data.train.tensors[0], size, seed=run.seed)
        run.arm(f"size {size}", lambda size=size, counts=counts: scene.learned("kmeans", size=size) | counts)
    run.values("selection", run.arm("selection", scene.chosen))
    permuted = run.arm("permuted", scene.learned, Permuted())
    plain = run.arm("unwhitened", scene.learned, "kmeans", whiten=False)
    empty = run.arm("blank", near_zero, run, run.data(s.deep, train_size=s.train_size, normalize=False))
    run.values(
        "negative_control", pick(scores, "random", "kmeans"), permuted=permuted["accuracy"],
        unwhitened=plain["accuracy"], blank_kept=empty["kept"], blank_dropped=empty["dropped"],
    )  # fmt: skip


def figures(results: Results) -> plots.Figures:
    """The bench over all banks, and accuracy by number and size of filters."""
    s = results.settings
    numbers = {kind: [(f"{kind} {K}", "accuracy") for K in s.numbers] for kind in ("random", "kmeans")}
    sizes = {"kmeans": [(f"size {size}", "accuracy") for size in s.sizes]}
    return {
        "bench": plots.bars(results, {n.replace("_", " "): (f"bench {n}", "accuracy") for n in (*FIXED, *s.methods)},
                            ylabel="test accuracy (%)"),
        "number": plots.curves(results, numbers, x=s.numbers, xlabel="number of filters", ylabel="test accuracy (%)"),
        "size": plots.curves(results, sizes, x=s.sizes, xlabel="size of filters", ylabel="test accuracy (%)"),
    }  # fmt: skip
