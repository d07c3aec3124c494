"""Measures ForwardGNN on Cora: its algorithms against tuned backprop, memory by depth, links, controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torchfolio.data.graphs import Graph
from torchfolio.experiments._graph_backprop import backprop_links, backprop_nodes, backprop_peak
from torchfolio.experiments._graphs_to_classify import load_graph
from torchfolio.experiments._misled_graph_learning import EqualNegatives, NextClass, RandomClass
from torchfolio.local.forwardgnn import ForwardGNNClassifier, ForwardGNNLinkPredictor, link_split
from torchfolio.measure import alternate
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """The graph and how long everything trains."""

    graph: str = setting("cora", '`"cora"`, `"citeseer"`, or `"synthetic"`, a small one that is drawn')
    hidden: int = setting(128, "width of all layers")
    layers: int = setting(3, "depth of single forward")
    short: int = setting(2, "depth of forward-forward, top-down and links")
    lr: float = setting(0.01, "learning rate of forward learning")
    lrs: tuple[float, ...] = setting((1e-3, 1e-2), "learning rates that backprop may choose from on validation data")
    epochs: int = setting(80, "steps of a layer; of backprop, twice as many, for all layers together")
    val_every: int = setting(10, "steps between validations")
    patience: int = setting(10, "validations without improvement before a layer stops")
    depths: tuple[int, ...] = setting(
        (2, 4, 8), "numbers of layers whose memory is measured; the first, 4 and 8 are compared"
    )


SCALES = {
    "smoke": Settings(graph="synthetic", hidden=16, epochs=10, val_every=5),
    "quick": Settings(),
    "full": Settings(layers=4, epochs=1000, val_every=2, patience=100, depths=(2, 4, 8, 16)),
}

LOSS_BOUND = 2 * float(torch.tensor(2.0).log())
"""Least loss of forward-forward where negatives are positives, a logit of 0 for both; in float32, as losses are."""


def options(settings: Settings, seed: int, **changed: Any) -> dict[str, Any]:
    """Arguments of an estimator of forward learning."""
    own = {"hidden": settings.hidden, "layers": settings.layers, "lr": settings.lr, "epochs": settings.epochs}
    return {**own, "val_every": settings.val_every, "patience": settings.patience, "seed": seed, **changed}


def run(run: Run[Settings]) -> None:
    """Node classification by all algorithms, backprop, memory, links and controls."""
    settings = run.settings
    graph, test = load_graph(settings.graph, run.seed, run.device)

    def fit(kind: type[ForwardGNNClassifier] = ForwardGNNClassifier, **changed: Any) -> dict[str, Any]:
        model = kind(**options(settings, run.seed, **changed)).fit(graph)
        accuracy = float((model.predict()[test] == graph.y[test]).double().mean())
        lowest = min(min(losses) for losses in model.losses_)
        return {"accuracy": accuracy, "by_depth": model.layer_scores_, "lowest_loss": lowest}

    short = settings.short
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "sf_gcn": fit,
        "sf_sage": lambda: fit(conv="sage"),
        "ff_la": lambda: fit(algorithm="ff-la", layers=short),
        "ff_vn": lambda: fit(algorithm="ff-vn", conv="sage", layers=short),
        "top2input": lambda: fit(algorithm="top2input", layers=short),
        "top2loss": lambda: fit(algorithm="top2loss", layers=short),
        "shifted": lambda: fit(NextClass, layers=1),
        "random": lambda: fit(RandomClass, layers=1),
        "equal": lambda: fit(EqualNegatives, algorithm="ff-la", layers=1),
        # A layer that has not moved: its goodness already says which labels the neighbours have.
        "untrained": lambda: fit(algorithm="ff-la", layers=1, epochs=1, lr=1e-12),
        "backprop": lambda: backprop_nodes(settings, graph, test, run.seed),
        "memory": lambda: _memory(settings, graph),
        "time": lambda: _step_times(settings, graph),
        "links": lambda: _links(settings, graph, run.seed),
    }
    got = {name: run.arm(name, arms[name]) for name in run.progress(arms, "arms")}
    accuracy = {name: arm["accuracy"] for name, arm in got.items() if "accuracy" in arm}
    run.values("node_classification", pick(accuracy, "backprop"), gcn=accuracy["sf_gcn"], sage=accuracy["sf_sage"])
    run.values("memory", pick(got["memory"], "ratio", "growth", "backprop_growth"))
    ratio = got["time"]["sf"] / got["time"]["ff-la"]
    run.values("forward_forward", labels=accuracy["ff_la"], virtual_nodes=accuracy["ff_vn"], time_ratio=ratio)
    run.values("link_prediction", got["links"])
    run.values("top_down", pick(accuracy, "top2input", "top2loss"), sf=accuracy["sf_gcn"])
    run.values("control_wrong_class", pick(accuracy, "shifted", "random"))
    run.values("control_equal_negatives", lowest_loss=got["equal"]["lowest_loss"] / LOSS_BOUND)
    largest = float(torch.bincount(graph.y[test]).max() / int(test.sum()))
    run.values("control_equal_accuracy", pick(accuracy, "equal", "untrained"), largest_class=largest)


def _links(settings: Settings, graph: Graph, seed: int) -> dict[str, float]:
    """Area under the ROC curve on test edges, by forward learning and by backprop."""
    split = link_split(graph.edge_index, graph.num_nodes, seed=seed)
    forward = ForwardGNNLinkPredictor(**options(settings, seed, layers=settings.short)).fit(graph, split)
    backprop = backprop_links(settings, graph, split, seed)
    return {"forward": forward.score(split.test, split.test_negative), "backprop": backprop}


def _memory(settings: Settings, graph: Graph) -> dict[str, Any]:
    """Most bytes held in a step, features and parameters excluded, by depth."""
    depths = settings.depths
    models = [ForwardGNNClassifier(hidden=settings.hidden, layers=depth, epochs=1).fit(graph) for depth in depths]
    forward = [model.peak_saved_bytes_ for model in models]
    backprop = [backprop_peak(graph, settings.hidden, depth) for depth in depths]
    four, eight = depths.index(4), depths.index(8)
    return {"forward": forward, "backprop": backprop, "ratio": forward[four] / backprop[four],
            "growth": forward[eight] / forward[0], "backprop_growth": backprop[eight] / backprop[0]}  # fmt: skip


def _step_times(settings: Settings, graph: Graph) -> dict[str, float]:
    """Seconds of a training step of all layers of the short network: fits of 45 and of 5 steps, each at its fastest."""
    algorithms: tuple[Any, ...] = ("sf", "ff-la")
    own: dict[str, Any] = {"hidden": settings.hidden, "layers": settings.short, "n_negatives": 2}
    given = graph.x, graph.edge_index, graph.y, graph.train_mask
    fits: dict[str, Any] = {
        f"{name} {steps}": partial(ForwardGNNClassifier(algorithm=name, epochs=steps, **own).fit, *given)
        for name in algorithms for steps in (5, 45)
    }  # fmt: skip
    fastest = {case: min(seconds) for case, seconds in alternate(**fits, repeats=2).seconds.items()}
    return {name: (fastest[f"{name} 45"] - fastest[f"{name} 5"]) / 40 for name in algorithms}


def figures(results: Results) -> plots.Figures:
    """Accuracy of all arms, and memory by depth."""
    names = ("sf_gcn", "sf_sage", "ff_la", "ff_vn", "top2input", "top2loss", "backprop", "random", "shifted", "equal",
             "untrained")  # fmt: skip
    memory = {name: ("memory", name) for name in ("forward", "backprop")}
    by_depth = {name: (name, "by_depth") for name in ("sf_gcn", "sf_sage")}
    return {
        "accuracy": plots.bars(results, {name: (name, "accuracy") for name in names}, ylabel="test accuracy"),
        "memory": plots.curves(results, memory, x=results.settings.depths, xlabel="layers", ylabel="peak saved bytes",
                               logy=True),
        "depth": plots.curves(results, by_depth, xlabel="layers trained", ylabel="validation accuracy"),
    }  # fmt: skip
