"""Measures physical local learning beside backprop through the simulator, on a twin, and with hardware in the loop."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.experiments._acoustic_vowels import vowels
from torchfolio.experiments._physical_backprop import train_through_twins
from torchfolio.experiments._physical_learner import PhysicalLearner, System, silent
from torchfolio.local.physical_ff import PhysicalLocalFeatures, PhysicalLocalNet
from torchfolio.local.physical_systems import KerrCavity, MultimodeOptics
from torchfolio.runs import Results, Run, pick, plots, setting


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


class NoContrast(PhysicalLocalNet):
    """The control: negatives carry the right label too."""

    def wrong_labels(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """The labels as they are."""
        return y


class Study(PhysicalLearner):
    """The arms of one seed, on the same specimens."""

    def optics(self) -> dict[str, Any]:
        """Optics by the local rule; then without labels, and through a swap of the specimens."""
        net = self.network(MultimodeOptics)
        outcome = self.course(net)
        blind = copy.deepcopy(net)
        blind.embed = lambda x, y: net.embed(x, None)
        outcome |= {"no_label": 100 * blind.score(*self.test), "before": 100 * outcome["curve"][-1]}
        for block in net.blocks:
            block.physical.drift(1.0)
        episode = [net.score(*self.test)]
        for epoch in range(5):
            self.fit(net, 1, first=False, seed=100 + epoch)
            episode.append(net.score(*self.test))
        return outcome | {"swapped": 100 * episode[0], "recovered": 100 * episode[-1], "episode": episode}

    def backprop(self, system: System, skip: bool = False, error: float = 0.0, aware: bool = False) -> dict[str, Any]:
        """The same blocks by backprop through twins that are wrong by `error`, with or without hardware in the loop."""
        s, net = self.settings, self.network(system, skip).to(self.run.device)
        own = {"lr": s.lr, "batch_size": s.batch_size, "epochs": 2 * s.epochs if aware else s.backprop_epochs}
        own |= {"error": error, "aware": aware, "seed": self.run.seed}
        return train_through_twins(net.blocks, (*self.train, *self.test), **own)

    def calls(self) -> dict[str, float]:
        """Physical calls for each block and batch of positives or negatives, with few and many steps on it."""
        shares, size = {}, self.settings.batch_size
        for name, steps in (("few", 1), ("many", 10)):
            net = self.network(MultimodeOptics).to(self.run.device)
            net.fit(*self.train, epochs=1, inner_steps=steps, batch_size=size)
            shares[name] = net.physical_calls / (2 * 2 * math.ceil(len(self.train[0]) / size))
        return shares

    def no_contrast(self) -> dict[str, float]:
        """Largest distance of the losses from that of a guess, log 2, where negatives carry the right labels too."""
        net = self.fit(self.network(MultimodeOptics, kind=NoContrast), 3)
        distance = np.abs(np.array(net.losses) - math.log(2)).max()
        return {"loss_distance": float(distance), "accuracy": 100 * net.score(*self.test)}

    def unsupervised(self) -> dict[str, float]:
        """A readout of features that are learned without labels, and of untrained ones."""
        scores = {}
        for name, epochs in (("untrained", 1), ("trained", max(self.settings.epochs // 2, 1))):
            net = PhysicalLocalFeatures(self.blocks(64, MultimodeOptics), 10, (8, 8), standardize=False)
            start = copy.deepcopy([block.linear.state_dict() for block in net.blocks])
            self.fit(net, epochs)
            if name == "untrained":  # the scaling is fitted, the weights are as they were drawn
                for block, state in zip(net.blocks, start, strict=True):
                    block.linear.load_state_dict(state)
            scores[name] = 100 * net.fit_readout(*self.train).score(*self.test)
        return scores


def run(run: Run[Settings]) -> None:
    """Train every arm on the same specimens, digits first."""
    s, study = run.settings, Study(run)
    optics, kerr = run.arm("optics", study.optics), run.arm("kerr", study.local, KerrCavity)
    ideal_optics = run.arm("ideal_optics", study.backprop, MultimodeOptics, True)
    ideal_kerr = run.arm("ideal_kerr", study.backprop, KerrCavity, True)
    run.values("accuracy", optics=100 * optics["curve"][-1], kerr=100 * kerr["curve"][-1],
               ideal_optics=ideal_optics["accuracy"], ideal_kerr=ideal_kerr["accuracy"])  # fmt: skip
    bare = run.arm("no_skip", study.local, MultimodeOptics, False)
    ours = 100 * bare["curve"][-1]
    errors = {f"twin_{100 * error:.0f}": error for error in s.twin_errors}
    twins = {k: run.arm(k, study.backprop, MultimodeOptics, error=error)["accuracy"] for k, error in errors.items()}
    run.values("no_twin", twins, ours=ours)
    aware = run.arm("physics_aware", study.backprop, MultimodeOptics, error=0.2, aware=True)
    calls = {"ours_calls": bare["calls"], "physics_aware_calls": aware["calls"]}
    run.values("hardware_aware", calls, ours=ours, physics_aware=aware["accuracy"])
    run.values("drift", pick(optics, "before", "swapped", "recovered"))
    run.values("control_no_label", accuracy=optics["no_label"])
    run.values("physical_calls", run.arm("calls", study.calls))
    run.values("control_no_contrast", run.arm("no_contrast", study.no_contrast))
    run.values("control_no_physics", accuracy=100 * run.arm("no_physics", study.local, silent, False)["curve"][-1])
    run.values("unsupervised", run.arm("unsupervised", study.unsupervised))
    if s.cavity_epochs:
        own = {"cavity_epochs": s.cavity_epochs, "epochs": s.vowel_epochs, "lr": s.lr, "seed": run.seed}
        run.values("measured_cavity", run.arm("vowels", vowels, silent(20, 20, seed=0), **own))


def figures(results: Results) -> plots.Figures:
    """Accuracy by epoch, through the swap, and deployed against twin error."""
    arms = {"optics": ("optics", "curve"), "Kerr cavity": ("kerr", "curve"), "optics, no skip": ("no_skip", "curve")}
    drift = {"optics": ("optics", "episode")}
    twins = {name: (name, "accuracy") for name in results.arms[0] if name.startswith(("twin_", "ideal_", "physics_"))}
    return {
        "accuracy": plots.curves(results, arms, xlabel="epoch", ylabel="test accuracy"),
        "drift": plots.curves(results, drift, xlabel="epochs after swap", ylabel="accuracy"),
        "twins": plots.bars(results, twins, ylabel="test accuracy on the true system (%)"),
    }
