"""Measures AugLocal beside backprop and the earlier local rules on one small residual network."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

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
from torchfolio.local.auglocal import AugLocal
from torchfolio.local.heads import LocalHeads
from torchfolio.local.local_model import LocalHead, Network
from torchfolio.runs import Results, Run
from torchfolio.runs.bench import Bench
from torchfolio.runs.tasks import load


@dataclass(frozen=True)
class Settings(Task):
    """The common task and AugLocal's own knobs.

    Attributes:
        aux_depth: maximal auxiliary depth.
        tau: pyramid coefficient.
        selection: which layers the auxiliary networks copy.
        sweep: further auxiliary depths to train at.
        deep: depth of the network whose memory is measured besides.
    """

    aux_depth: int = 3
    tau: float = 0.5
    selection: str = "uniform"
    sweep: tuple[int, ...] = ()
    deep: int = 56


SCALES = {
    "smoke": Settings(**SMOKE, epochs=6, aux_depth=2, deep=26),
    "quick": Settings(),
    "full": Settings(**FULL, sweep=(1, 2, 4, 6)),
}


class BlindAugLocal(AugLocal):
    """The negative control: auxiliary networks that read detached features, so that no layer hears its loss."""

    def isolate(self, network: Network) -> tuple[list[nn.Module], list[LocalHead]]:
        blocks, heads = super().isolate(network)
        return blocks, [_Blind(head) for head in heads]


class _Blind(LocalHead):
    def __init__(self, head: LocalHead) -> None:
        super().__init__()
        self.head = head

    def loss(self, features: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.head.loss(features.detach(), x, y)


def run(run: Run[Settings]) -> None:
    """Train by every rule, then measure what a step costs."""
    settings, data = run.settings, load(run)
    own = {"aux_depth": settings.aux_depth, "tau": settings.tau, "selection": settings.selection}
    rules: dict[str, RuleFactory] = {
        "backprop": Backprop,
        "linear": lambda: LocalHeads("linear"),
        "dgl": lambda: LocalHeads("dgl"),
        "auglocal": lambda: AugLocal(**own),
        "blind": lambda: BlindAugLocal(**own),
    }
    for depth in settings.sweep:
        rules[f"depth_{depth}"] = lambda depth=depth: AugLocal(**{**own, "aux_depth": depth})
    accuracy, done = {}, {}
    for name, rule in rules.items():
        done[name] = run.arm(name, lambda rule=rule: train(settings, data, rule(), seed=run.seed, device=run.device))
        accuracy[name] = done[name]["accuracy"]
    run.values(
        "accuracy",
        {name: accuracy[name] for name in ("auglocal", "backprop", "dgl", "linear")},
    )
    # The stem and the residual blocks below the last module; none of them may have moved.
    trained = _share_of_last_module(settings, data)
    run.values(
        "negative_control",
        {
            "auglocal": accuracy["auglocal"],
            "blind": accuracy["blind"],
            "moved": done["blind"]["weights_moved"],
            "last_module": trained,
        },
    )
    _memory(run, data, rules)
    _pyramid(run, data)


def _share_of_last_module(settings: Settings, data: DataSplits) -> float:
    """Share of the network's parameter tensors that belong to the last module."""
    net = network(settings, data)
    local = AugLocal(settings.aux_depth).prepare(net, tuple(t[:2] for t in data.train.tensors))
    return len(list(local.blocks[-1].parameters())) / len(list(net.parameters()))


def _memory(run: Run[Settings], data: DataSplits, rules: dict[str, RuleFactory]) -> None:
    def measure() -> dict[str, float]:
        costs: dict[str, float] = {}
        cases = {
            **{n: rules[n] for n in ("backprop", "linear", "dgl", "auglocal")},
            "checkpointed": CheckpointedBackprop,
        }
        for name, rule in cases.items():
            for key, value in step_cost(run.settings, data, rule()).items():
                costs[f"{name}_{key}"] = value
        for name in ("backprop", "auglocal"):
            costs[f"deep_{name}_saved_mb"] = step_cost(run.settings, data, rules[name](), run.settings.deep)["saved_mb"]
        return costs

    costs = run.arm("cost", measure)
    run.values(
        "memory",
        {
            "ratio": costs["auglocal_saved_mb"] / costs["backprop_saved_mb"],
            "deep_ratio": costs["deep_auglocal_saved_mb"] / costs["deep_backprop_saved_mb"],
        },
    )


def _pyramid(run: Run[Settings], data: DataSplits) -> None:
    def plans() -> dict[str, object]:
        outcome: dict[str, object] = {}
        for name, tau in (("constant", 0.0), ("pyramid", 0.5)):
            rule = AugLocal(5, tau=tau)
            rule.prepare(network(run.settings, data, 56), tuple(t[:2] for t in data.train.tensors))
            plan = rule.auxiliary_plan()
            outcome[f"{name}_flops"] = int(plan["flops"].to_numpy().sum())
            outcome[f"{name}_depths"] = plan["depth"].tolist()
        return outcome

    plan = run.arm("plans", plans)
    depths = plan["pyramid_depths"]
    ordered = all(a >= b for a, b in zip(depths, depths[1:], strict=False))
    run.values(
        "pyramid",
        {
            "ratio": plan["pyramid_flops"] / plan["constant_flops"],
            "first_depth": depths[0],
            "least_depth": min(depths),
            "non_increasing": float(ordered),
        },
    )


def figures(results: Results) -> dict[str, Figure]:
    """Accuracy beside saved memory, accuracy against auxiliary depth, and probes where they were measured."""
    made = {"accuracy and memory": _trade_off(results)}
    settings: Settings = results.settings
    if settings.sweep:
        made["auxiliary depth"] = _sweep(results, settings)
    if settings.probes:
        made["linear probes"] = _probes(results)
    return made


def _trade_off(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ("backprop", "linear", "dgl", "auglocal"):
        accuracy = results.values(name, "accuracy")
        memory = results.values("cost", f"{name}_saved_mb")
        ax.errorbar(memory.mean(), accuracy.mean(), yerr=accuracy.std(), fmt="o", markersize=8, capsize=3)
        ax.annotate(name, (memory.mean(), accuracy.mean()), xytext=(8, 6), textcoords="offset points")
    ax.axvline(results.values("cost", "checkpointed_saved_mb").mean(), ls=":", c="grey", label="checkpointed backprop")
    ax.set(xlabel="peak saved for backward (MB, one batch)", ylabel="test accuracy (%)", xlim=(0, None))
    ax.legend(loc="lower right")
    ax.grid(alpha=0.3)
    return fig


def _sweep(results: Results, settings: Settings) -> Figure:
    arms = sorted([(depth, f"depth_{depth}") for depth in settings.sweep] + [(settings.aux_depth, "auglocal")])
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    values = [results.values(arm, "accuracy") for _, arm in arms]
    ax.errorbar([d for d, _ in arms], [v.mean() for v in values], yerr=[v.std() for v in values], marker="o", capsize=3)
    ax.axhline(results.values("backprop", "accuracy").mean(), ls="--", c="grey", label="backprop")
    ax.set(xlabel="maximal auxiliary depth D", ylabel="test accuracy (%)")
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def _probes(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in ("backprop", "linear", "dgl", "auglocal"):
        ax.plot(results.values(name, "probes").mean(0), marker=".", label=name)
    ax.set(xlabel="hidden layer", ylabel="linear probe accuracy (%)")
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def peers(bench: Bench) -> None:
    """A training step beside those of backprop that recomputes activations, and of backprop."""
    bench.compare(
        "a step of ResNet-20 on 32 images",
        ours=stepper(AugLocal(3)),
        checkpointed_backprop=stepper(CheckpointedBackprop()),
        backprop=stepper(Backprop()),
    )
