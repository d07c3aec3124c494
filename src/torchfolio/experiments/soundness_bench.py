"""SoundnessBench: are counterexamples hidden, are sound verifiers left alone, are planted bugs caught?"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchfolio.experiments._buggy_verifiers import BUGS
from torchfolio.experiments._hiding_networks import hiding_network, instances, train
from torchfolio.robustness.soundness_bench import AttackOnly, HiddenModel, export, load, run_verifier
from torchfolio.robustness.verifiers import Crown, CrownSplit, Interval
from torchfolio.runs import Results, Run, pick, plots, setting

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Settings:
    """Instances, training, attacks and verifiers."""

    shape: tuple[int, ...] = setting((10,), "shape of one input")
    pairs: int = setting(5, "number of pairs of each kind")
    eps: float = setting(0.2, "relative radius")
    data_range: float = setting(1.0, "range of the inputs")
    network: str = setting("mlp", '`"mlp"`, `"cnn"` or `"avgpool"`')
    widths: tuple[int, ...] = setting((128, 128, 128, 20), "hidden layers of the perceptron")
    steps: int = setting(3000, "number of steps of training")
    lr: float = setting(2e-3, "peak rate")
    window: int = setting(100, "perturbations that are remembered")
    pgd_steps: int = setting(12, "number of steps of a training step's attack")
    pgd_restarts: int = setting(24, "number of restarts of it")
    pgd_alphas: tuple[float, ...] = setting((0.25, 0.1, 0.04), "step sizes over the radius, in turn")
    sweep: tuple[tuple[float, int], ...] = setting(
        ((0.25, 0), (0.25, 50), (0.1, 100), (0.02, 200)), "attacks that a hidden counterexample survives"
    )
    sweep_restarts: int = setting(100, "number of restarts of each")
    timeout: float = setting(3.0, "seconds a sound verifier gets for an instance")
    bug_timeout: float = setting(1.5, "seconds one with a bug gets")
    severities: tuple[float, ...] = setting((1.0, 0.9, 0.5, 0.2, 0.0), "severities of the bugs; 1 is none")


SCALES = {
    "smoke": Settings(
        pairs=2, widths=(32, 32), steps=200, pgd_steps=5, pgd_restarts=8, window=20, sweep=((0.25, 0),),
        sweep_restarts=3, timeout=0.5, bug_timeout=0.3, severities=(1.0, 0.0),
    ),
    "quick": Settings(),
    "full": Settings(
        shape=(1, 5, 5), pairs=10, network="cnn", steps=10_000, lr=1e-3, window=300, pgd_steps=75, pgd_restarts=75,
        pgd_alphas=(0.1,), sweep_restarts=1000, timeout=60.0, bug_timeout=20.0,
        sweep=((0.25, 0), (0.25, 100), (0.02, 100), (0.02, 250), (0.02, 500), (0.01, 1000), (0.01, 3000), (0.01, 5000)),
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train three ways, then ask verifiers, sound ones and broken ones, about what is hidden."""
    settings = run.settings
    ways = {"two_objective": {"window": settings.window}, "no_window": {"window": 1}, "naive": {"attack": None}}
    arms = {name: run.arm(name, train, run, own) for name, own in ways.items()}
    both = arms["two_objective"]
    found = pick(both, "hidden", "misclassified", "right")
    run.values("hidden", found, pairs=settings.pairs)
    run.values("ablations", {name: arm["hidden"] for name, arm in arms.items()})
    run.values("clean_instances", clean=both["clean"], pairs=settings.pairs)
    if not both["hidden"]:
        return
    asked = run.arm("verifiers", ask, run, both)
    sound = {name.replace("+", "_"): asked["verified"][name] for name in ("interval", "crown", "crown+split")}
    run.values("sound_verifiers", sound)
    run.values("detection", _detection(settings, both, asked))


def _detection(settings: Settings, both: dict[str, Any], asked: dict[str, Any]) -> dict[str, float]:
    """What of the planted bugs is caught, and whether that is what should be."""
    hidden, flagged = both["hidden"], asked["flagged"]
    shrink = flagged["shrink_input"]
    caught = [
        any(count > 0 for s, count in zip(settings.severities, flagged[kind], strict=True) if s < 1 and worst >= s)
        for kind, worst in (("shrink_intermediate", 0.2), ("drop_domains", 0.5))
    ]
    caught.append(any(count > 0 for s, count in zip(settings.severities, shrink, strict=True) if 0 < s <= 0.5))
    as_expected = (
        asked["verified"]["attack only"] == hidden
        and shrink[-1] == hidden
        and all(flagged[kind][0] == 0 for kind in BUGS)
        and all(a <= b for a, b in zip(shrink, shrink[1:], strict=False))
        and any(caught)
    )
    values = {"hidden": hidden, "attack_only": asked["verified"]["attack only"]}
    for kind, counts in flagged.items():
        values |= {f"{kind}_{s:g}".replace(".", "_"): c for s, c in zip(settings.severities, counts, strict=True)}
    return {**values, "as_expected": float(as_expected)}


def ask(run: Run[Settings], both: dict[str, Any]) -> dict[str, Any]:
    """Verdicts of sound and broken verifiers on the instances of the network that hides."""
    settings, pairs = run.settings, instances(run)
    net = hiding_network(settings)
    net.load_state_dict({k: torch.as_tensor(np.asarray(v)) for k, v in both["weights"].items()})
    valid = torch.tensor(both["valid"])
    hidden = HiddenModel(net.eval(), pairs, valid, sweep=settings.sweep, restarts=settings.sweep_restarts)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = load(export(hidden, Path(folder)))
        verified: dict[str, int] = {}
        falsified: dict[str, int] = {}
        clean: dict[str, int] = {}
        for verifier in (Interval(), Crown(), CrownSplit(), AttackOnly()):
            table = run_verifier(benchmark, verifier, settings.timeout)
            verified[verifier.name] = _count(table, "unverifiable", "verified")
            falsified[verifier.name] = _count(table, "unverifiable", "falsified")
            clean[verifier.name] = _count(table, "clean", "verified")
        ours = type(benchmark)(benchmark.folder, tuple(i for i in benchmark if i.kind == "unverifiable"))
        flagged = {
            kind: [
                _count(run_verifier(ours, bug(severity), settings.bug_timeout), "unverifiable", "verified")
                for severity in settings.severities
            ]
            for kind, bug in BUGS.items()
        }
    return {"verified": verified, "falsified": falsified, "clean_verified": clean, "flagged": flagged}


def _count(table: pd.DataFrame, kind: str, status: str) -> int:
    return sum(row["kind"] == kind and row["status"] == status for row in table.to_dict("records"))


def figures(results: Results) -> plots.Figures:
    """Hidden counterexamples by step, a line for each seed, and what verifiers with bugs are caught at."""
    hiding, ax = plots.axes("training step", "counterexamples hidden")
    for k, name in enumerate(("two_objective", "no_window", "naive")):
        for i, seed in enumerate(results.arms):
            hidden = np.asarray(seed[name]["hidden_by_step"]) + 0.06 * (k - 1)
            ax.plot(seed[name]["steps"], hidden, f"C{k}.-", label=name.replace("_", " ") if i == 0 else None)
    ax.legend()
    severities = results.settings.severities
    bugs, ax = plots.axes("what is left of the truth (1: no bug)", "hidden instances called verified")
    asked = [seed for seed in results.arms if "verifiers" in seed]
    for k, kind in enumerate(BUGS if asked else ()):
        shares = [np.asarray(seed["verifiers"]["flagged"][kind]) / seed["two_objective"]["hidden"] for seed in asked]
        ax.plot(range(len(severities)), np.mean(shares, 0) + 0.01 * k, f"C{k}o-", label=kind.replace("_", " "))
        ax.legend()
    ax.set_xticks(range(len(severities)), [f"{s:g}" for s in severities])
    return {"hiding": hiding, "bugs": bugs}
