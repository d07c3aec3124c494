"""Measures ForwardGNN on Cora: its algorithms against tuned backprop, memory by depth, links, controls.

Five algorithms, a baseline trained end to end for nodes and for links, and memory and time make it longer than most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import one_of
from torchfolio.data.graphs import Graph, planetoid
from torchfolio.engine import seeded
from torchfolio.local.forwardgnn import ForwardGNNClassifier, ForwardGNNLinkPredictor, link_split
from torchfolio.local.graph_layers import (
    Aggregated,
    FrozenLayer,
    adjacency_of,
    aggregate_once,
    make_conv,
    normalize_rows,
    tensors_of,
)
from torchfolio.local.graph_training import LayerStep, adam, train_locally
from torchfolio.measure import auroc
from torchfolio.runs import Results, Run, plots


@dataclass(frozen=True)
class Settings:
    """The graph and how long everything trains.

    Attributes:
        graph: `"cora"`, `"citeseer"`, or `"synthetic"`, a small one that is drawn.
        hidden: width of all layers.
        layers: depth of single forward.
        short: depth of forward-forward, top-down and links.
        lr: learning rate of forward learning.
        lrs: learning rates that backprop may choose from on validation data.
        epochs: steps of a layer; of backprop, twice as many, for all layers together.
        val_every: steps between validations.
        patience: validations without improvement before a layer stops.
        depths: numbers of layers whose memory is measured; the first, 4 and the last are compared.
    """

    graph: str = "cora"
    hidden: int = 128
    layers: int = 3
    short: int = 2
    lr: float = 0.01
    lrs: tuple[float, ...] = (1e-3, 1e-2)
    epochs: int = 80
    val_every: int = 10
    patience: int = 10
    depths: tuple[int, ...] = (2, 4, 8)


SCALES = {
    "smoke": Settings(graph="synthetic", hidden=16, epochs=10, val_every=5),
    "quick": Settings(),
    "full": Settings(layers=4, epochs=1000, val_every=2, patience=100, depths=(2, 4, 8, 16)),
}


class Linked(ForwardGNNClassifier):
    """Training nodes linked to other virtual nodes than their own: the next class's, or a random one's."""

    how = "shifted"

    def _linked_classes(self, y: Tensor) -> Tensor:
        if self.how == "shifted":
            return torch.where(y < 0, y, (y + 1) % self.num_classes_)
        drawn = torch.randint(self.num_classes_, y.shape, generator=torch.Generator().manual_seed(self.seed))
        return torch.where(y < 0, y, drawn.to(y.device))


class Randomly(Linked):
    """Linked at random."""

    how = "random"


class EqualNegatives(ForwardGNNClassifier):
    """The negative graph has the right labels, too."""

    def _negatives(self, y: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [y]


def run(run: Run[Settings]) -> None:
    """Node classification by all algorithms, backprop, memory, links and controls."""
    settings = run.settings
    graph, test = _load(settings, run.seed, run.device)

    def fit(kind: type[ForwardGNNClassifier] = ForwardGNNClassifier, **changed: Any) -> dict[str, Any]:
        options = {"hidden": settings.hidden, "layers": settings.layers, "lr": settings.lr, "epochs": settings.epochs}
        options |= {"val_every": settings.val_every, "patience": settings.patience, "seed": run.seed}
        model = kind(**(options | changed)).fit(graph)
        accuracy = float((model.predict()[test] == graph.y[test]).double().mean())
        lowest = min(min(losses) for losses in model.losses_)
        return {"accuracy": accuracy, "by_depth": model.layer_scores_, "lowest_loss": lowest}

    short: dict[str, Any] = {"layers": settings.short}
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "sf_gcn": fit,
        "sf_sage": lambda: fit(conv="sage"),
        "ff_la": lambda: fit(algorithm="ff-la", **short),
        "ff_vn": lambda: fit(algorithm="ff-vn", conv="sage", **short),
        "top2input": lambda: fit(algorithm="top2input", **short),
        "top2loss": lambda: fit(algorithm="top2loss", **short),
        "shifted": lambda: fit(Linked, layers=1),
        "random": lambda: fit(Randomly, layers=1),
        "equal": lambda: fit(EqualNegatives, algorithm="ff-la", layers=1),
        # A layer that has not moved: its goodness already says which labels the neighbours have.
        "untrained": lambda: fit(algorithm="ff-la", layers=1, epochs=1, lr=1e-12),
        "backprop": lambda: _backprop(settings, graph, test, run.seed),
        "memory": lambda: _memory(settings, graph),
        "time": lambda: _step_times(settings, graph),
        "links": lambda: _links(settings, graph, run.seed),
    }
    names = run.progress(list(arms), "arms")
    got = {name: run.arm(name, arms[name]) for name in names}
    accuracy = {name: arm["accuracy"] for name, arm in got.items() if "accuracy" in arm}
    run.values("node_classification", gcn=accuracy["sf_gcn"], sage=accuracy["sf_sage"], backprop=accuracy["backprop"])
    run.values("memory", **{name: got["memory"][name] for name in ("ratio", "growth", "backprop_growth")})
    run.values(
        "forward_forward",
        labels=accuracy["ff_la"],
        virtual_nodes=accuracy["ff_vn"],
        time_ratio=got["time"]["sf"] / got["time"]["ff-la"],
    )
    run.values("link_prediction", forward=got["links"]["forward"], backprop=got["links"]["backprop"])
    run.values("top_down", **{name: accuracy[key] for name, key in TOP_DOWN.items()})
    run.values("control_wrong_class", shifted=accuracy["shifted"], random=accuracy["random"])
    largest = float(torch.bincount(graph.y[test]).max() / int(test.sum()))
    bound = 2 * float(torch.log(torch.tensor(2.0)))
    run.values("control_equal_negatives", lowest_loss=got["equal"]["lowest_loss"] / bound)
    run.values(
        "control_equal_accuracy", equal=accuracy["equal"], untrained=accuracy["untrained"], largest_class=largest
    )


TOP_DOWN = {"sf": "sf_gcn", "top2input": "top2input", "top2loss": "top2loss"}


def _load(settings: Settings, seed: int, device: Any) -> tuple[Graph, Tensor]:
    """The graph with a random split: 64 % to train, 16 % to validate, 20 % to test."""
    one_of("graph", settings.graph, ("cora", "citeseer", "synthetic"))
    graph = planetoid(settings.graph) if settings.graph != "synthetic" else _synthetic()
    order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(seed)) / graph.num_nodes
    masks = [order < 0.64, (order >= 0.64) & (order < 0.8), order >= 0.8]
    tensors = [t.to(device) for t in (graph.x, graph.edge_index, graph.y, *masks)]
    return Graph(*tensors), tensors[-1]


def _synthetic(n: int = 150, classes: int = 3) -> Graph:
    g, y = torch.Generator().manual_seed(0), torch.arange(n) % classes
    upper = (torch.rand(n, n, generator=g) < torch.where(y[:, None] == y, 0.1, 0.01)).triu(1)
    x = torch.rand(n, 60, generator=g) < torch.where(torch.arange(60) % classes == y[:, None], 0.1, 0.02)
    none = torch.zeros(n, dtype=torch.bool)
    return Graph(x.float(), (upper | upper.T).nonzero().T, y, none, none, none)


class _Stack(nn.Module):
    """GCN layers trained end to end; the graph is normalised and the features are aggregated once, too."""

    def __init__(self, graph: Graph, widths: list[int]) -> None:
        super().__init__()
        widths = [graph.x.shape[1], *widths]
        self.convs = nn.ModuleList(make_conv("gcn", i, o) for i, o in zip(widths, widths[1:], strict=False))
        self.to(graph.x.device)
        self.adjacency = adjacency_of(self.convs[0], graph.x, graph.edge_index)
        self.first: Aggregated = aggregate_once(self.convs[0], normalize_rows(graph.x), self.adjacency)

    def forward(self) -> Tensor:
        h: Any = self.convs[0].transform(self.first.operand)  # pyright: ignore[reportCallIssue]
        for conv in list(self.convs)[1:]:
            h = conv.transform(self.adjacency @ F.relu(h))  # pyright: ignore[reportCallIssue, reportOptionalOperand]
        return h


def _best(settings: Settings, make: Callable[[], _Stack], loss: Any, score: Any, report: Any, seed: int) -> Any:
    """Train end to end at each learning rate; the report of the one that validates best."""
    results = []
    for lr in settings.lrs:
        with seeded(seed):
            net = make()
            step = LayerStep(net, lambda net=net: loss(net()), adam(net, lr, 5e-4))
            _, best = train_locally(
                net, step, lambda net=net: score(net()), epochs=2 * settings.epochs,
                val_every=settings.val_every, patience=settings.patience,
            )  # fmt: skip
        with torch.no_grad():
            results.append((best, report(net())))
    return max(results)


def _backprop(settings: Settings, graph: Graph, test: Tensor, seed: int) -> dict[str, Any]:
    def accuracy(mask: Tensor) -> Callable[[Tensor], float]:
        return lambda z: float((z.argmax(1) == graph.y)[mask].double().mean())

    found = {}
    for depth in (2, 3):
        widths = [settings.hidden] * (depth - 1) + [graph.num_classes]
        loss = lambda z: F.cross_entropy(z[graph.train_mask], graph.y[graph.train_mask])  # noqa: E731
        make = lambda widths=widths: _Stack(graph, widths)  # noqa: E731
        _, found[f"depth_{depth}"] = _best(settings, make, loss, accuracy(graph.val_mask), accuracy(test), seed)
    return found | {"accuracy": max(found.values())}


def _links(settings: Settings, graph: Graph, seed: int) -> dict[str, float]:
    split = link_split(graph.edge_index, graph.num_nodes, seed=seed)
    options = {"hidden": settings.hidden, "layers": settings.short, "lr": settings.lr, "epochs": settings.epochs}
    options |= {"val_every": settings.val_every, "patience": settings.patience, "seed": seed}
    forward = ForwardGNNLinkPredictor(**options).fit(graph, split)
    sparse = Graph(graph.x, split.edge_index, *(graph.y, *[graph.train_mask] * 3))

    def logits(z: Tensor, pairs: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([pairs, negatives], 1)
        logit = (z.index_select(0, both[0]) * z.index_select(0, both[1])).sum(1)
        return logit, (torch.arange(len(logit), device=z.device) < pairs.shape[1]).to(z)

    loss = lambda z: F.binary_cross_entropy_with_logits(*logits(z, *split[1:3]))  # noqa: E731
    score, report = (lambda z, of=of: float(auroc(*logits(z, *split[of : of + 2]))) for of in (3, 5))
    make = lambda: _Stack(sparse, [settings.hidden] * settings.short)  # noqa: E731
    _, backprop = _best(settings, make, loss, score, report, seed)
    return {"forward": forward.score(split.test, split.test_negative), "backprop": backprop}


def _memory(settings: Settings, graph: Graph) -> dict[str, Any]:
    """Most bytes held in a step, features and parameters excluded, by depth."""
    forward, backprop = [], []
    for depth in settings.depths:
        model = ForwardGNNClassifier(hidden=settings.hidden, layers=depth, epochs=1).fit(graph)
        net = _Stack(graph, [settings.hidden] * (depth - 1) + [graph.num_classes])
        step = LayerStep(
            net,
            lambda net=net: F.cross_entropy(net()[graph.train_mask], graph.y[graph.train_mask]),
            adam(net, 1e-3, 0.0),
            tensors_of(net.first),
        )
        step()
        forward.append(model.peak_saved_bytes_)
        backprop.append(step.peak)
    four, eight = settings.depths.index(4), settings.depths.index(8)
    return {
        "forward": forward,
        "backprop": backprop,
        "ratio": forward[four] / backprop[four],
        "growth": forward[eight] / forward[0],
        "backprop_growth": backprop[eight] / backprop[0],
    }


def _step_times(settings: Settings, graph: Graph) -> dict[str, float]:
    """Seconds of a training step of all layers of the short network: fits of 45 and of 5 steps, each at its fastest."""
    masks = (graph.x, graph.edge_index, graph.y, graph.train_mask)
    seconds: dict[tuple[Any, int], list[float]] = {(name, n): [] for name in ("sf", "ff-la") for n in (5, 45)}
    for _ in range(2):
        for (name, epochs), times in seconds.items():
            model = ForwardGNNClassifier(
                hidden=settings.hidden, layers=settings.short, algorithm=name, epochs=epochs, n_negatives=2
            )
            start = time.perf_counter()
            model.fit(*masks)
            times.append(time.perf_counter() - start)
    return {name: (min(seconds[name, 45]) - min(seconds[name, 5])) / 40 for name in ("sf", "ff-la")}


def figures(results: Results) -> dict[str, Figure]:
    """Accuracy of all arms, and memory by depth."""
    names = [
        "sf_gcn",
        "sf_sage",
        "ff_la",
        "ff_vn",
        "top2input",
        "top2loss",
        "backprop",
        "random",
        "shifted",
        "equal",
        "untrained",
    ]
    memory = {name: ("memory", name.replace(" ", "_")) for name in ("forward", "backprop")}
    return {
        "accuracy": plots.bars(results, {name: (name, "accuracy") for name in names}, ylabel="test accuracy"),
        "memory": plots.curves(
            results, memory, x=results.settings.depths, xlabel="layers", ylabel="peak saved bytes", logy=True
        ),
        "depth": plots.curves(
            results,
            {name: (name, "by_depth") for name in ("sf_gcn", "sf_sage")},
            xlabel="layers trained",
            ylabel="validation accuracy",
        ),
    }


def peers(bench: Any) -> None:
    """A step of every layer on Cora: ours, and torch_geometric's layer called anew each time."""
    graph, _ = _load(SCALES["quick"], 0, "cpu")
    bench.compare("layer-epoch, GCN, Cora, three layers", **_layer_epochs(graph))


def _layer_epochs(graph: Graph) -> dict[str, Callable[[], Any]]:
    """A step of single forward's three layers on Cora with virtual nodes, aggregated once or by torch_geometric."""
    from torch_geometric.nn import GCNConv

    from torchfolio.local.forwardgnn import augment_with_virtual_nodes

    c, n = graph.num_classes, graph.num_nodes
    v = augment_with_virtual_nodes(graph.x, graph.edge_index, graph.y, graph.train_mask, c)
    train = graph.train_mask.nonzero().flatten()
    rows, y = torch.cat([train, torch.arange(n, n + c)]), graph.y[train]
    steps: dict[str, list[LayerStep]] = {"ours": [], "pyg": []}
    for l in range(3):
        h = normalize_rows(v.x if not l else torch.rand(n + c, 128))
        layer, peer = make_conv("gcn", h.shape[1], 128), GCNConv(h.shape[1], 128)
        part = FrozenLayer(layer, [h], v.edge_index, dense_rows=0 if l else c)[rows]
        whole = lambda peer=peer, h=h: F.relu(peer(h, v.edge_index)).index_select(0, rows)  # noqa: E731
        for name, module, output in (("ours", layer, part), ("pyg", peer, whole)):
            loss = lambda f=output: (lambda z: F.cross_entropy(z[:-c] @ z[-c:].T, y))(f())  # noqa: E731
            steps[name].append(LayerStep(module, loss, adam(module, 0.01, 5e-4)))
    return {name: lambda all_=all_: [step() for step in all_] for name, all_ in steps.items()}
