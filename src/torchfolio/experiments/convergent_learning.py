"""Measures what two networks from different initialisations have in common, unit by unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn

from torchfolio.engine import evaluate
from torchfolio.experiments._mispaired_samples import mispaired
from torchfolio.experiments._permuted_networks import permuted_copy
from torchfolio.experiments._stacked_convolutions import fresh, trained
from torchfolio.insight.convergent_learning import ConvergenceReport, plot_filter_pairs
from torchfolio.insight.convergent_learning.layer import LayerConvergence
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


class Study:
    """The networks of one seed, and what is compared with what; figures are means over all pairs."""

    def __init__(self, run: Run[Settings]) -> None:
        self.run, self.settings, self.layers = run, run.settings, run.settings.layers
        # Raw pixels: standardised ones leave fewer units dead and make untrained first layers alike.
        self.data = run.data(run.settings.data, test_size=run.settings.probe, normalize=False)
        self.probe = self.data.test.tensors[0]
        self.net = cache(partial(trained, run, self.data))

    def report(self, a: nn.Module, b: nn.Module, **options: Any) -> ConvergenceReport:
        """Two networks on the probe."""
        return ConvergenceReport.from_modules(a, b, self.probe, self.layers, **options)

    def trained(self) -> dict[str, Any]:
        """Trained networks with each other."""
        nets = [self.net(k) for k in range(self.settings.nets)]
        reports = [self.report(a, b) for a, b in combinations(nets, 2)]
        result: dict[str, Any] = {"accuracy": np.mean([evaluate(net, self.data.test)["accuracy"] for net in nets])}
        for k, layer in enumerate(self.layers):
            of_layer = [report.layers[k] for report in reports]
            summaries: list[dict[str, Any]] = [one.summary() for one in of_layer]
            for key in (*KEPT, *GROUPS, "dead_a", "dead_b"):
                result[f"{layer}_{key}"] = np.mean([summary[key] for summary in summaries])
            result[f"{layer}_gap"] = np.mean([gap(one) for one in of_layer])
            result[f"{layer}_curve"] = np.mean([one.prediction.curve().to_numpy() for one in of_layer], axis=0)
        self.run.figure("units", reports[0].plot(), "Matched units, prediction and clusters of two trained networks")
        first, second = (net.get_parameter("conv1.0.weight") for net in nets[:2])
        pairs = plot_filter_pairs(first, second, reports[0]["conv1"].match)
        self.run.figure("filters", pairs, "Filters of the first layer above their matches")
        return result

    def untrained(self) -> dict[str, float]:
        """A trained network with one before training."""
        report = self.report(self.net(0), fresh(self.run, self.data, self.settings.nets))
        return {one.layer_a: one.match.mean for one in report.layers}

    def permuted(self) -> dict[str, float]:
        """A trained network with its copy whose units are in another order."""
        other, orders = permuted_copy(self.net(0), self.run.generator())
        layers = self.report(self.net(0), other, alphas=(1e-3,)).layers
        right = [(order[one.match.col] == one.match.row).double() for one, order in zip(layers, orders, strict=True)]
        units = [one.prediction.nonzeros[0][one.blocks.alive_b] for one in layers]
        return {
            "recovered": float(torch.cat(right).mean()),
            "least_value": float(torch.cat([one.match.value for one in layers]).min()),
            "most_units": float(torch.cat(units).max()),
        }

    def shuffled(self) -> dict[str, float]:
        """Every layer of two networks with the samples of the second in another order."""
        nets = [self.net(k) for k in range(self.settings.nets)]
        features = [collect_features(net, self.probe, self.layers, flatten=False) for net in nets]
        generator, most = self.run.generator(), self.settings.shuffled
        scores = {k: mispaired([f[k] for f in features], most, generator) for k in self.layers}
        matches, losses = np.array(list(scores.values())).T
        extremes = {"largest_match": matches.max(), "least_loss": losses.min(), "largest_loss": losses.max()}
        return {**{f"{layer}_match": match for layer, (match, _) in scores.items()}, **extremes}


def gap(layer: LayerConvergence) -> float:
    """How much better the best partner is than the match, over the matched units."""
    best = dict(zip(layer.semi.row.tolist(), layer.semi.value.tolist(), strict=True))
    return float(np.mean([best[row] for row in layer.match.row.tolist()]) - layer.match.mean)


def run(run: Run[Settings]) -> None:
    """Compare trained networks with each other, with untrained ones, with a permuted copy, and shuffled."""
    layers, study = run.settings.layers, Study(run)
    with threads(1):
        pair, untrained = run.arm("trained", study.trained), run.arm("untrained", study.untrained)
        run.values("permuted_copy", run.arm("permuted", study.permuted))
        shuffled = run.arm("shuffled", study.shuffled)
    matched = {layer: pair[f"{layer}_bipartite"] for layer in layers}
    run.values("shared_features", matched, **{f"{layer}_untrained": untrained[layer] for layer in layers})
    run.values("not_one_to_one", pick(pair, *(f"{layer}_gap" for layer in layers)))
    few = {}
    for layer in layers[:-1]:
        alone = pair[f"{layer}_one_to_one_loss"]  # that of a unit's match
        few[f"{layer}_dense"] = pair[f"{layer}_dense_loss"] / alone
        few[f"{layer}_few"] = pair[f"{layer}_sparse_loss"] / alone
        few[f"{layer}_units"] = pair[f"{layer}_sparse_units"]
    run.values("few_to_one", few)
    run.values("clusters", pick(pair, *(f"{layer}_{key}" for layer in layers for key in GROUPS)))
    run.values("negative_control", pick(shuffled, "largest_match", "least_loss", "largest_loss"))


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
