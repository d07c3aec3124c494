"""Measures what two networks from different initialisations have in common, unit by unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import evaluate
from torchfolio.experiments._permuted_networks import permuted_copy
from torchfolio.experiments._stacked_convolutions import fresh, trained
from torchfolio.insight.activations import unit_rows
from torchfolio.insight.convergent_learning import (
    ConvergenceReport,
    bipartite_match,
    correlation_blocks,
    plot_filter_pairs,
    sparse_prediction,
)
from torchfolio.models import collect_features
from torchfolio.runs import Results, Run, pick, plots, setting, threads


@dataclass(frozen=True)
class Settings:
    """Knobs of the comparison."""

    data: str = setting("mnist10k", "name of the data set")
    channels: tuple[int, ...] = setting((16, 32), "channels of the convolutions")
    kernels: tuple[int, ...] = setting((5, 3), "their sides")
    strides: tuple[int, ...] = setting((2, 2), "strides of the convolutions")
    padding: int = setting(0, "padding of the convolutions")
    hidden: int = setting(64, "units of the fully connected layer")
    nets: int = setting(4, "networks trained for each seed; all their pairs are compared")
    epochs: int = setting(4, "number of epochs of Adam")
    lr: float = setting(1e-3, "its step size")
    batch_size: int = setting(64, "batch size of training")
    probe: int = setting(2000, "test images that the comparison sees")
    shuffled: int = setting(50_000, "most samples of the negative control")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the compared layers."""
        return (*(f"conv{k}" for k in range(1, len(self.channels) + 1)), "fc1")


SCALES = {
    "smoke": Settings(data="digits", kernels=(3, 3), strides=(1, 2), padding=1, nets=2, epochs=8, probe=300),
    "quick": Settings(),
    "full": Settings(
        data="cifar10", channels=(32, 48, 64, 64), kernels=(5, 3, 3, 3), strides=(2, 1, 2, 1), padding=1, hidden=128,
        epochs=20,
    ),
}  # fmt: skip
KEPT = ("bipartite", "semi", "one_to_one_loss", "dense_loss", "sparse_loss", "sparse_units", "few_units")
GROUPS = ("mixed_clusters", "contrast", "random_contrast")


Net = Callable[[int], nn.Sequential]


def run(run: Run[Settings]) -> None:
    """Compare trained networks with each other, with untrained ones, with a permuted copy, and shuffled."""
    layers = run.settings.layers
    # Raw pixels: standardised ones leave fewer units dead and make untrained first layers alike.
    data = run.data(run.settings.data, test_size=run.settings.probe, normalize=False)
    probe = data.test.tensors[0]
    net = cache(partial(trained, run, data))
    with threads(1):
        pair = run.arm("trained", _trained, run, data, probe, net)
        untrained = run.arm("untrained", _untrained, run, data, probe, net)
        copied = run.arm("permuted", _permuted, run, probe, net)
        shuffled = run.arm("shuffled", _shuffled, run, probe, net)
    run.values("permuted_copy", copied)
    matched = {layer: pair[f"{layer}_bipartite"] for layer in layers}
    run.values("shared_features", matched, **{f"{layer}_untrained": untrained[layer] for layer in layers})
    run.values("not_one_to_one", {f"{layer}_gap": pair[f"{layer}_gap"] for layer in layers})
    few = {}
    for layer in layers[:-1]:
        alone = pair[f"{layer}_one_to_one_loss"]  # that of a unit's match
        few[f"{layer}_dense"] = pair[f"{layer}_dense_loss"] / alone
        few[f"{layer}_few"] = pair[f"{layer}_sparse_loss"] / alone
        few[f"{layer}_units"] = pair[f"{layer}_sparse_units"]
    run.values("few_to_one", few)
    run.values("clusters", {f"{layer}_{key}": pair[f"{layer}_{key}"] for layer in layers for key in GROUPS})
    run.values("negative_control", pick(shuffled, "largest_match", "least_loss", "largest_loss"))


def _trained(run: Run[Settings], data: DataSplits, probe: Tensor, net: Net) -> dict[str, Any]:
    """All pairs of trained networks; figures are means over the pairs."""
    reports = []
    for a, b in combinations(range(run.settings.nets), 2):
        report = ConvergenceReport.from_modules(net(a), net(b), probe, run.settings.layers)
        reports.append(report)
        if (a, b) == (0, 1):
            run.figure("units", report.plot(), "Matched units, prediction and clusters of two trained networks")
            first, second = (net(k).get_parameter("conv1.0.weight") for k in (a, b))
            pairs = plot_filter_pairs(first, second, report["conv1"].match)
            run.figure("filters", pairs, "Filters of the first layer above their matches")
    result: dict[str, Any] = {
        "accuracy": np.mean([evaluate(net(k), data.test)["accuracy"] for k in range(run.settings.nets)])
    }
    for k, layer in enumerate(run.settings.layers):
        for key in (*KEPT, *GROUPS, "dead_a", "dead_b"):
            result[f"{layer}_{key}"] = float(np.mean([r.layers[k].summary()[key] for r in reports]))
        result[f"{layer}_gap"] = float(np.mean([_gap(r, k) for r in reports]))
        curves = [r.layers[k].prediction.curve() for r in reports]
        result[f"{layer}_curve"] = np.mean([c.to_numpy() for c in curves], axis=0)
    return result


def _gap(report: ConvergenceReport, layer: int) -> float:
    """How much better the best partner is than the match, over the matched units."""
    one = report.layers[layer]
    best = dict(zip(one.semi.row.tolist(), one.semi.value.tolist(), strict=True))
    return float(np.mean([best[row] for row in one.match.row.tolist()]) - one.match.mean)


def _untrained(run: Run[Settings], data: DataSplits, probe: Tensor, net: Net) -> dict[str, float]:
    other = fresh(run, data, run.settings.nets)
    report = ConvergenceReport.from_modules(net(0), other, probe, run.settings.layers)
    return {one.layer_a: one.match.mean for one in report.layers}


def _permuted(run: Run[Settings], probe: Tensor, net: Net) -> dict[str, float]:
    other, orders = permuted_copy(net(0), run.generator())
    report = ConvergenceReport.from_modules(net(0), other, probe, run.settings.layers, alphas=(1e-3,))
    right, values, units = [], [], []
    for one, order in zip(report.layers, orders, strict=True):
        right.append((order[one.match.col] == one.match.row).double())
        values.append(one.match.value)
        units.append(one.prediction.nonzeros[0][one.blocks.alive_b])
    return {
        "recovered": float(torch.cat(right).mean()),
        "least_value": float(torch.cat(values).min()),
        "most_units": float(torch.cat(units).max()),
    }


def _shuffled(run: Run[Settings], probe: Tensor, net: Net) -> dict[str, float]:
    """Every layer of two networks with the samples of the second in another order; figures are means over the pairs."""
    nets = run.settings.nets
    features = [collect_features(net(k), probe, run.settings.layers, flatten=False) for k in range(nets)]
    generator = run.generator()
    matches, losses = {}, {}
    for layer in run.settings.layers:
        match, loss = [], []
        for pair in combinations(features, 2):
            a, b = (unit_rows(f[layer]).flatten(0, 1) for f in pair)
            kept = torch.randperm(len(a), generator=generator)[: run.settings.shuffled]
            broken = kept[torch.randperm(len(kept), generator=generator)]
            blocks = correlation_blocks(a[kept], b[broken])
            match.append(bipartite_match(blocks.between).mean)
            loss.append(float(sparse_prediction(blocks, [3e-2]).curve()["loss"].iloc[0]))
        matches[layer], losses[layer] = float(np.mean(match)), float(np.mean(loss))
    return {
        **{f"{layer}_match": value for layer, value in matches.items()},
        "largest_match": max(matches.values()),
        "least_loss": min(losses.values()),
        "largest_loss": max(losses.values()),
    }


def figures(results: Results) -> plots.Figures:
    """Matching by layer, and prediction by the number of units."""
    layers = results.settings.layers
    series = {
        "best partner": {layer: ("trained", f"{layer}_semi") for layer in layers},
        "one to one": {layer: ("trained", f"{layer}_bipartite") for layer in layers},
        "with an untrained net": {layer: ("untrained", layer) for layer in layers},
        "shuffled samples": {layer: ("shuffled", f"{layer}_match") for layer in layers},
    }
    prediction, ax = plots.axes("units used for one prediction", "held-out loss (0.5: its mean alone; star: its match)")
    for k, layer in enumerate(layers):
        _, loss, units = results.values("trained", f"{layer}_curve").mean(0).T
        ax.plot(units, loss, "o-", c=f"C{k}", label=layer)
        ax.plot([1], [results.values("trained", f"{layer}_one_to_one_loss").mean()], "*", c=f"C{k}", ms=11)
    ax.set(xscale="log", ylim=(0, None))
    ax.legend()
    return {
        "matching by layer": plots.groups(results, series, ylabel="mean correlation of matched units"),
        "prediction by units": prediction,
    }
