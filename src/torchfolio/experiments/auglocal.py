"""Measures AugLocal beside backprop and the earlier local rules on one small residual network."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import Backprop
from torchfolio.experiments._local_learning import (
    FULL,
    SMOKE,
    CheckpointedBackprop,
    RuleFactory,
    Task,
    costs,
    network,
    train,
)
from torchfolio.local.auglocal import AugLocal
from torchfolio.local.heads import LocalHeads
from torchfolio.local.local_model import LocalHead, Network
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import load


@dataclass(frozen=True)
class Settings(Task):
    """The common task and AugLocal's own knobs."""

    aux_depth: int = setting(3, "maximal auxiliary depth")
    tau: float = setting(0.5, "pyramid coefficient")
    selection: str = setting("uniform", "choice of the layers that the auxiliary networks copy")
    sweep: tuple[int, ...] = setting((), "further auxiliary depths to train at")
    deep: int = setting(56, "depth of the network whose memory is measured besides")


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
    done = {}
    for name, rule in rules.items():
        done[name] = run.arm(name, lambda rule=rule: train(settings, data, rule(), seed=run.seed, device=run.device))
    accuracy = {name: arm["accuracy"] for name, arm in done.items()}
    run.values("accuracy", pick(accuracy, "auglocal", "backprop", "dgl", "linear"))
    # The stem and the residual blocks below the last module; none of them may have moved.
    trained = _share_of_last_module(settings, data)
    run.values("negative_control", auglocal=accuracy["auglocal"], blind=accuracy["blind"],
               moved=done["blind"]["weights_moved"], last_module=trained)  # fmt: skip
    cases = {**{name: rules[name] for name in ARMS}, "checkpointed": CheckpointedBackprop}
    deep = dict.fromkeys(("backprop", "auglocal"), settings.deep)
    cost = run.arm("cost", costs, settings, data, cases, deep)
    run.values("memory", ratio=cost["auglocal_saved_mb"] / cost["backprop_saved_mb"],
               deep_ratio=cost["deep_auglocal_saved_mb"] / cost["deep_backprop_saved_mb"])  # fmt: skip
    plan = run.arm("plans", _plans, run, data)
    depths = plan["pyramid_depths"]
    ordered = all(a >= b for a, b in pairwise(depths))
    run.values("pyramid", ratio=plan["pyramid_flops"] / plan["constant_flops"], first_depth=depths[0],
               least_depth=min(depths), non_increasing=float(ordered))  # fmt: skip


ARMS = ("backprop", "linear", "dgl", "auglocal")
"""Rules that the figures compare."""


def _share_of_last_module(settings: Settings, data: DataSplits) -> float:
    """Share of the network's parameter tensors that belong to the last module."""
    net = network(settings, data)
    local = AugLocal(settings.aux_depth).prepare(net, tuple(t[:2] for t in data.train.tensors))
    return len(list(local.blocks[-1].parameters())) / len(list(net.parameters()))


def _plans(run: Run[Settings], data: DataSplits) -> dict[str, object]:
    """Depths and operations of the auxiliary networks of a ResNet-56, alike and in a pyramid."""
    outcome: dict[str, object] = {}
    for name, tau in (("constant", 0.0), ("pyramid", 0.5)):
        rule = AugLocal(5, tau=tau)
        rule.prepare(network(run.settings, data, 56), tuple(t[:2] for t in data.train.tensors))
        plan = rule.auxiliary_plan()
        outcome[f"{name}_flops"] = int(plan["flops"].to_numpy().sum())
        outcome[f"{name}_depths"] = plan["depth"].tolist()
    return outcome


def figures(results: Results) -> plots.Figures:
    """Accuracy beside saved memory, accuracy against auxiliary depth, and probes where they were measured."""
    settings: Settings = results.settings
    points = {name: (("cost", f"{name}_saved_mb"), (name, "accuracy")) for name in ARMS}
    made = {"accuracy and memory": plots.scatter(
        results, points, xlabel="peak saved for backward (MB, one batch)", ylabel="test accuracy (%)")}  # fmt: skip
    checkpointed = results.values("cost", "checkpointed_saved_mb").mean()
    made["accuracy and memory"].axes[0].axvline(checkpointed, ls=":", c="grey")
    if settings.sweep:
        depths = sorted({*settings.sweep, settings.aux_depth})
        arms = ["auglocal" if depth == settings.aux_depth else f"depth_{depth}" for depth in depths]
        made["auxiliary depth"] = plots.curves(
            results, {"AugLocal": [(arm, "accuracy") for arm in arms]}, x=depths,
            levels={"backprop": ("backprop", "accuracy")}, xlabel="maximal auxiliary depth D", ylabel="test accuracy (%)",
        )  # fmt: skip
    if settings.probes:
        made["linear probes"] = plots.curves(results, {name: (name, "probes") for name in ARMS}, xlabel="hidden layer",
                                             ylabel="linear probe accuracy (%)")  # fmt: skip
    return made
