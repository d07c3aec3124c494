"""Measures physical local learning beside backprop through the simulator, on a twin, and with the hardware in the loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.experiments._acoustic_vowels import vowels
from torchfolio.experiments._physical_backprop import train_through_twins
from torchfolio.local.physical_ff import PhysicalBlock, PhysicalLocalFeatures, PhysicalLocalNet
from torchfolio.local.physical_systems import KerrCavity, MultimodeOptics, PhysicalSystem, as_physical
from torchfolio.runs import Results, Run, pick, plots, setting

Split = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Sizes and budgets."""

    train_size: int = setting(1437, "training digits")
    hidden: int = setting(100, "width of both layers and of the second system's inputs")
    epochs: int = setting(20, "passes of the local rule")
    inner_steps: int = setting(10, "steps on every batch before the next")
    lr: float = setting(4e-3, "learning rate of Adam of the local rule")
    batch_size: int = setting(480, "examples of a batch of the local rule")
    backprop_epochs: int = setting(
        60, "passes of ideal and in-silico backprop; physics-aware training gets equal physical calls"
    )
    cavity_epochs: int = setting(10, "passes that fit the surrogate to the measured cavity; 0 leaves the vowels out")
    vowel_epochs: int = setting(60, "passes of the local rule over the vowels, all in one batch")
    twin_errors: tuple[float, ...] = setting(
        (0.0, 0.2, 0.4), "relative errors of the twin that backprop in silico trains on"
    )


SCALES = {
    "smoke": Settings(train_size=300, hidden=30, epochs=2, inner_steps=3, backprop_epochs=3, cavity_epochs=0),
    "quick": Settings(),
    "full": Settings(hidden=200, epochs=60, backprop_epochs=200, cavity_epochs=100, vowel_epochs=200),
}


def run(run: Run[Settings]) -> None:
    """Train every arm on the same specimens, digits first."""
    s, digits = run.settings, _digits(run)
    done = {name: run.arm(name, _local, run, digits, kind) for name, kind in SYSTEMS.items()}
    ideal = {name: run.arm(f"ideal_{name}", _backprop, run, digits, kind, True) for name, kind in SYSTEMS.items()}
    accuracies = {name: 100 * arm["curve"][-1] for name, arm in done.items()}
    run.values("accuracy", accuracies | {f"ideal_{name}": arm["accuracy"] for name, arm in ideal.items()})
    bare = run.arm("no_skip", _local, run, digits, MultimodeOptics, False)
    ours = 100 * bare["curve"][-1]
    optics = (run, digits, MultimodeOptics, False)
    twins = {f"twin_{100 * e:.0f}": run.arm(f"twin_{100 * e:.0f}", _backprop, *optics, e) for e in s.twin_errors}
    run.values("no_twin", {name: arm["accuracy"] for name, arm in twins.items()}, ours=ours)
    aware = run.arm("physics_aware", _backprop, *optics, 0.2, True)
    run.values("hardware_aware", ours=ours, physics_aware=aware["accuracy"], ours_calls=bare["calls"],
               physics_aware_calls=aware["calls"])  # fmt: skip
    optical = done["optics"]
    run.values("drift", pick(optical, "before", "swapped", "recovered"))
    run.values("control_no_label", accuracy=optical["no_label"])
    run.values("physical_calls", run.arm("calls", _calls, run, digits))
    run.values("control_no_contrast", run.arm("no_contrast", _no_contrast, run, digits))
    silent = run.arm("no_physics", _local, run, digits, _silent, False)
    run.values("control_no_physics", accuracy=100 * silent["curve"][-1])
    run.values("unsupervised", run.arm("unsupervised", _unsupervised, run, digits))
    if s.cavity_epochs:
        own = {"cavity_epochs": s.cavity_epochs, "epochs": s.vowel_epochs, "lr": s.lr, "seed": run.seed}
        run.values("measured_cavity", run.arm("vowels", vowels, _silent(20, 20, seed=0), **own))


def _silent(n_in: int, n_out: int, *, seed: int) -> PhysicalSystem:
    return as_physical(lambda x: x.new_zeros(len(x), n_out), n_in, n_out, seed=seed)


SYSTEMS: dict[str, Callable[..., PhysicalSystem]] = {"optics": MultimodeOptics, "kerr": KerrCavity}


def _digits(run: Run[Settings]) -> Split:
    data = run.data("digits", normalize=False)
    x, y = (torch.cat([part.tensors[k] for part in (data.train, data.val, data.test)]) for k in (0, 1))
    rows = torch.randperm(len(x), generator=run.generator())
    x, y = x.flatten(1)[rows].to(run.device), y[rows].to(run.device)
    n = min(run.settings.train_size, len(x) - 360)
    return x[:n], y[:n], x[-360:], y[-360:]


def _blocks(run: Run[Settings], n_in: int, system: Any, skip: bool = True) -> list[PhysicalBlock]:
    widths, seed = (n_in, run.settings.hidden), 10 * run.seed
    n = run.settings.hidden
    return [PhysicalBlock(system(w, n, seed=seed + k), n, skip, seed=seed + k) for k, w in enumerate(widths)]


def _network(
    run: Run[Settings], system: Any, skip: bool = True, kind: type[PhysicalLocalNet] = PhysicalLocalNet
) -> PhysicalLocalNet:
    """Two blocks for digits with their labels in front."""
    return kind(_blocks(run, 74, system, skip), 10, 64, standardize=False)


def _train(run: Run[Settings], net: Any, split: Split, epochs: int, first: bool = True, seed: int = 0) -> Any:
    s = run.settings
    train = net.to(run.device).fit if first else net.partial_fit
    own = {"inner_steps": s.inner_steps, "lr": s.lr, "batch_size": s.batch_size, "seed": run.seed + 1000 * seed}
    return train(*split[:2], epochs=epochs, **own)


def _local(run: Run[Settings], split: Split, system: Any, skip: bool = True) -> dict[str, Any]:
    """Test accuracy by epoch, then without labels, then through a swap of the specimens."""
    net = _network(run, system, skip)
    curve, calls = [], 0
    for epoch in run.progress(range(run.settings.epochs), "epochs"):
        net.reset_calls()
        _train(run, net, split, 1, epoch == 0, epoch)
        calls += net.physical_calls
        curve.append(net.score(*split[2:]))
    reliance = [block.reliance() for block in net.blocks]
    outcome: dict[str, Any] = {"curve": curve, "calls": calls, "reliance": reliance}
    if system is not MultimodeOptics or not skip:
        return outcome
    blind = copy.deepcopy(net)
    blind.embed = lambda x, y: net.embed(x, None)
    outcome |= {"no_label": 100 * blind.score(*split[2:]), "before": 100 * curve[-1]}
    for block in net.blocks:
        block.physical.drift(1.0)
    episode = [net.score(*split[2:])]
    for epoch in range(5):
        _train(run, net, split, 1, False, 100 + epoch)
        episode.append(net.score(*split[2:]))
    return outcome | {"swapped": 100 * episode[0], "recovered": 100 * episode[-1], "episode": episode}


def _backprop(
    run: Run[Settings], split: Split, system: Any, skip: bool, error: float = 0.0, aware: bool = False
) -> dict[str, Any]:
    """The same blocks by backprop through twins that are wrong by `error`, with the hardware in the loop or without."""
    s, net = run.settings, _network(run, system, skip).to(run.device)
    return train_through_twins(net.blocks, split, error=error, aware=aware, lr=s.lr, batch_size=s.batch_size,
                               epochs=2 * s.epochs if aware else s.backprop_epochs, seed=run.seed)  # fmt: skip


def _calls(run: Run[Settings], split: Split) -> dict[str, float]:
    shares, batches = {}, math.ceil(len(split[0]) / run.settings.batch_size)
    for name, steps in (("few", 1), ("many", 10)):
        net = _network(run, MultimodeOptics).to(run.device)
        net.fit(*split[:2], epochs=1, inner_steps=steps, batch_size=run.settings.batch_size)
        shares[name] = net.physical_calls / (2 * 2 * batches)
    return shares


class NoContrast(PhysicalLocalNet):
    """The control: negatives carry the right label too."""

    def wrong_labels(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """The labels as they are."""
        return y


def _no_contrast(run: Run[Settings], split: Split) -> dict[str, float]:
    net = _train(run, _network(run, MultimodeOptics, kind=NoContrast), split, 3)
    distance = np.abs(np.array(net.losses) - math.log(2)).max()
    return {"loss_distance": float(distance), "accuracy": 100 * net.score(*split[2:])}


def _unsupervised(run: Run[Settings], split: Split) -> dict[str, float]:
    scores = {}
    for name, epochs in (("untrained", 1), ("trained", max(run.settings.epochs // 2, 1))):
        net = PhysicalLocalFeatures(_blocks(run, 64, MultimodeOptics), 10, (8, 8), standardize=False)
        start = copy.deepcopy([block.linear.state_dict() for block in net.blocks])
        _train(run, net, split, epochs)
        if name == "untrained":  # the scaling is fitted, the weights are as they were drawn
            for block, state in zip(net.blocks, start, strict=True):
                block.linear.load_state_dict(state)
        scores[name] = 100 * net.fit_readout(*split[:2]).score(*split[2:])
    return scores


def figures(results: Results) -> plots.Figures:
    """Accuracy by epoch, through the swap, and deployed against twin error."""
    arms = {"optics": ("optics", "curve"), "Kerr cavity": ("kerr", "curve"), "optics, no skip": ("no_skip", "curve")}
    twins = {name: (name, "accuracy") for name in results.arms[0] if name.startswith(("twin_", "ideal_", "physics_"))}
    return {
        "accuracy": plots.curves(results, arms, xlabel="epoch", ylabel="test accuracy"),
        "drift": plots.curves(
            results, {"optics": ("optics", "episode")}, xlabel="epochs after swap", ylabel="accuracy"
        ),
        "twins": plots.bars(results, twins, ylabel="test accuracy on the true system (%)"),
    }
