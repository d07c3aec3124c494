"""Measures MAN beside its host rule and backprop, part by part, on the common local learning task."""

from __future__ import annotations

from dataclasses import dataclass

from torchfolio.data import DataSplits
from torchfolio.engine import Backprop
from torchfolio.experiments._local_learning import FULL, SMOKE, RuleFactory, Task, costs, network, train
from torchfolio.local.heads import Host, LocalHeads
from torchfolio.local.local_model import Network
from torchfolio.local.man import MAN
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import load


@dataclass(frozen=True)
class Settings(Task):
    """The common task and MAN's own knobs."""

    host: Host = setting("dgl", "the local rule that MAN is added to")
    ema_momentum: float = setting(
        0.98, "momentum of the moving averages; their memory $1/(1-m)$ should be 5 to 15 % of the steps"
    )
    blocks: int = setting(0, "number of blocks; 0 takes every layer by itself")
    ablations: bool = setting(False, "whether to train, too, with the average alone and the branch alone")
    deep: int = setting(56, "depth of the network whose memory is measured besides")


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
    run.values("accuracy", pick(accuracy, "man", "host", "backprop"))
    run.values("control_frozen", pick(accuracy, "man", "frozen"))
    run.values("control_wrong_block", pick(accuracy, "man", "wrong_block"))
    cases = pick(rules, "backprop", "host", "man")
    cost = run.arm("cost", costs, settings, data, cases, dict.fromkeys(cases, settings.deep))
    run.values(
        "memory",
        ratio=cost["man_saved_mb"] / cost["backprop_saved_mb"],
        deep_ratio=cost["deep_man_saved_mb"] / cost["deep_backprop_saved_mb"],
        growth=cost["deep_man_saved_mb"] / cost["man_saved_mb"],
    )


def _other_layers(settings: Settings, data: DataSplits) -> dict[int, int]:
    """For every layer another of the same parameter shapes, the farthest; itself where there is none."""
    layers = Network.of(network(settings, data), data.train.tensors[0][:2]).layers
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in layers]
    return {
        l: max((k for k in range(len(layers)) if shapes[k] == shapes[l]), key=lambda k: abs(k - l))
        for l in range(len(layers))
    }


def figures(results: Results) -> plots.Figures:
    """Accuracy of every variant, and saved memory."""
    ablations = ("average_only", "branch_only") if results.settings.ablations else ()
    names = ("host", *ablations, "wrong_block", "frozen", "man", "backprop")
    compared = ("backprop", "host", "man")
    made = {
        "accuracy": plots.bars(results, {name: (name, "accuracy") for name in names}, ylabel="test accuracy (%)"),
        "memory": plots.bars(results, {name: ("cost", f"{name}_saved_mb") for name in compared},
                             ylabel="peak saved for backward (MB)"),
    }  # fmt: skip
    if results.settings.probes:
        made["linear probes"] = plots.curves(results, {name: (name, "probes") for name in compared},
                                             xlabel="hidden layer", ylabel="linear probe accuracy (%)")  # fmt: skip
    return made
