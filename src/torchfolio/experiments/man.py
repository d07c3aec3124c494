"""Measures MAN beside its host rule and backprop, part by part, on the common local learning task."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from torchfolio.data import DataSplits
from torchfolio.engine import Backprop
from torchfolio.experiments._local_learning import (
    FULL,
    SMOKE,
    CheckpointedBackprop,
    RuleFactory,
    Task,
    network,
    step_cost,
    stepper,
    train,
)
from torchfolio.local.heads import Host, LocalHeads
from torchfolio.local.local_model import Network
from torchfolio.local.man import MAN
from torchfolio.runs import Results, Run
from torchfolio.runs.bench import Bench
from torchfolio.runs.tasks import load


@dataclass(frozen=True)
class Settings(Task):
    """The common task and MAN's own knobs.

    Attributes:
        host: the local rule that MAN is added to.
        ema_momentum: of the moving averages; their memory $1/(1-m)$ should be 5 to 15 % of the steps.
        blocks: number of blocks; 0 takes every layer by itself.
        ablations: also train with the average alone and the branch alone.
        deep: depth of the network whose memory is measured besides.
    """

    host: Host = "dgl"
    ema_momentum: float = 0.98
    blocks: int = 0
    ablations: bool = False
    deep: int = 56


SCALES = {
    "smoke": Settings(**SMOKE, epochs=6, ema_momentum=0.5, ablations=True, deep=26),
    "quick": Settings(),
    "full": Settings(**FULL, ema_momentum=0.995, ablations=True),
}


def run(run: Run[Settings]) -> None:
    """Train by every variant, then measure what a step costs."""
    settings, data = run.settings, load(run)
    blocks = settings.blocks or None
    wrong = _other_layers(settings, data)
    own = {"blocks": blocks, "host": settings.host, "momentum": settings.ema_momentum}
    rules: dict[str, RuleFactory] = {
        "backprop": Backprop,
        "host": lambda: LocalHeads(settings.host, blocks=blocks),
        "man": lambda: MAN(**own),
        "frozen": lambda: MAN(**{**own, "momentum": 1.0}, init="random"),
        "wrong_block": lambda: MAN(**own, source=lambda j, following: wrong[following]),
    }
    if settings.ablations:
        rules["average_only"] = lambda: MAN(**own, bias=None)
        rules["branch_only"] = lambda: MAN(**own, ema=False)
    accuracy = {}
    for name, rule in rules.items():
        accuracy[name] = run.arm(
            name, lambda rule=rule: train(settings, data, rule(), seed=run.seed, device=run.device)
        )["accuracy"]
    run.values(
        "accuracy",
        {name: accuracy[name] for name in ("man", "host", "backprop")},
    )
    run.values("control_frozen", {name: accuracy[name] for name in ("man", "frozen")})
    run.values("control_wrong_block", {name: accuracy[name] for name in ("man", "wrong_block")})
    _memory(run, data, {name: rules[name] for name in ("backprop", "host", "man")})


def _other_layers(settings: Settings, data: DataSplits) -> dict[int, int]:
    """For every layer another of the same parameter shapes, the farthest; itself where there is none."""
    layers = Network.of(network(settings, data), data.train.tensors[0][:2]).layers
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in layers]
    return {
        l: max((k for k in range(len(layers)) if shapes[k] == shapes[l]), key=lambda k: abs(k - l))
        for l in range(len(layers))
    }


def _memory(run: Run[Settings], data: DataSplits, rules: dict[str, RuleFactory]) -> None:
    def measure() -> dict[str, float]:
        costs: dict[str, float] = {}
        for name, rule in rules.items():
            for key, value in step_cost(run.settings, data, rule()).items():
                costs[f"{name}_{key}"] = value
            costs[f"deep_{name}_saved_mb"] = step_cost(run.settings, data, rule(), run.settings.deep)["saved_mb"]
        return costs

    costs = run.arm("cost", measure)
    run.values(
        "memory",
        {
            "ratio": costs["man_saved_mb"] / costs["backprop_saved_mb"],
            "deep_ratio": costs["deep_man_saved_mb"] / costs["deep_backprop_saved_mb"],
            "growth": costs["deep_man_saved_mb"] / costs["man_saved_mb"],
        },
    )


def figures(results: Results) -> dict[str, Figure]:
    """Accuracy of every variant, and saved memory beside it."""
    names = ["host", "wrong_block", "frozen", "man", "backprop"]
    if results.settings.ablations:
        names[1:1] = ["average_only", "branch_only"]
    made = {"accuracy": _bars(results, names)}
    if results.settings.probes:
        made["linear probes"] = _probes(results)
    return made


def _bars(results: Results, names: list[str]) -> Figure:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", width_ratios=(2, 1))
    values = [results.values(name, "accuracy") for name in names]
    left.bar(names, [v.mean() for v in values], yerr=[v.std() for v in values], capsize=3, color="C0")
    left.set(ylabel="test accuracy (%)", ylim=(max(0.0, min(v.min() for v in values) - 5), None))
    left.tick_params(axis="x", rotation=20)
    costs = ["host", "man", "backprop"]
    right.bar(costs, [results.values("cost", f"{name}_saved_mb").mean() for name in costs], color="C1")
    right.set(ylabel="peak saved for backward (MB)")
    return fig


def _probes(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ("backprop", "host", "man"):
        ax.plot(results.values(name, "probes").mean(0), marker=".", label=name)
    ax.set(xlabel="hidden layer", ylabel="linear probe accuracy (%)")
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def peers(bench: Bench) -> None:
    """A training step beside those of backprop that recomputes activations, and of backprop."""
    bench.compare(
        "a step of ResNet-20 on 32 images",
        ours=stepper(MAN(host="dgl")),
        host=stepper(LocalHeads("dgl")),
        checkpointed_backprop=stepper(CheckpointedBackprop()),
        backprop=stepper(Backprop()),
    )
