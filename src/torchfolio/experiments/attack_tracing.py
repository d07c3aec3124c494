"""Traces attacks on copies of one classifier: keyed tracers against random, plain and shared ones, and a watermark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchfolio.data import DataSplits
from torchfolio.experiments._pixel_watermarks import random_masks, watermarked
from torchfolio.experiments._strided_classifiers import classifier
from torchfolio.robustness import hop_skip_jump, margin, nes, pgd
from torchfolio.robustness.attack_tracing import TracedCopy, Trial, separate, trace, trial, utility
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import OwnNetwork


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """The classifier, its copies, and the attacks."""

    data: str = setting("mnist10k", "set of images")
    epochs: int = setting(4, "passes of the classifier's training")
    lr: float = setting(2e-3, "its rate of Adam")
    copies: int = setting(6, "number of copies")
    steps: int = setting(600, "steps of the tracers' training")
    attacked: int = setting(4, "number of copies that are attacked")
    images: int = setting(100, "test images that each attack starts from")
    pgd_eps: float = setting(0.1, "radius of PGD")
    pgd_steps: int = setting(20, "its steps, of an eighth of the radius")
    nes_eps: float = setting(0.2, "radius of NES")
    nes_steps: int = setting(25, "its steps at most")
    nes_samples: int = setting(15, "pairs of queries a step")
    decisions: int = setting(300, "queries of HopSkipJump; 0 leaves it out")


SCALES = {
    "smoke": Settings(data="digits", epochs=3, copies=3, steps=30, attacked=2, images=20, nes_steps=5, decisions=60),
    "quick": Settings(),
    "full": Settings(data="cifar10", epochs=10, copies=10, decisions=2000, pgd_eps=0.03, nes_eps=0.06),
}

KINDS: dict[str, Any] = {"keyed": "keyed", "random": "random", "plain": None}
"""Noise of the copies' tracers, by arm."""


def run(run: Run[Settings]) -> None:
    """Train a classifier, make copies in several ways, attack some of them, and trace."""
    scene = Scene(run, run.data(run.settings.data, val=0, normalize=False))
    arms = {name: run.arm(name, scene.copies, noise) for name, noise in KINDS.items()}
    mask = run.arm("mask", scene.watermarked)
    keyed, plain = arms["keyed"], arms["plain"]
    run.values("tracing_white_box", pick(keyed, "success", "transferred"), accuracy=keyed["tracing"])
    decisions = {"by_decisions": keyed["decisions_tracing"]} if run.settings.decisions else {}
    run.values("tracing_black_box", decisions, accuracy=keyed["nes_tracing"], success=keyed["nes_success"])
    run.values("utility", mean_loss=100 * keyed["mean_loss"], worst_loss=100 * keyed["worst_loss"])
    traced = {name: arm["tracing"] for name, arm in {**arms, "mask": mask}.items()}
    run.values("negative_control", traced, shared_inconclusive=keyed["shared_inconclusive"])
    stopping = {"keyed_stopping": keyed["stopping_transfer"], "plain_stopping": plain["stopping_transfer"]}
    run.values("deterrence", stopping, keyed=keyed["transfer"], plain=plain["transfer"])


class Scene:
    """The classifier and what happens to its copies."""

    def __init__(self, run: Run[Settings], data: DataSplits) -> None:
        self.run, self.settings, self.data = run, run.settings, data
        self.classifier = classifier(run, data)
        order = torch.randperm(len(data.test), generator=run.generator())
        x, y = data.test.tensors
        self.test = x[order[: self.settings.images]], y[order[: self.settings.images]]

    def copies(self, noise: Any) -> dict[str, Any]:
        """Copies of one kind under attack by gradients; keyed ones by queries too."""
        s, seed = self.settings, self.run.seed
        keys = [1000 * seed + k for k in range(s.copies)]
        copies = separate(self.classifier, self.data.train, keys=keys, steps=s.steps, seed=seed, noise=noise)
        worth = utility(copies, self.classifier, self.data.test)
        white = self.attacked(copies, self.pgd())
        same = trace([copies[0]] * len(copies), white.x_adv[0], label=white.label)  # all with the first one's tracer
        out = {
            "classifier": worth.classifier, "accuracy": float(worth.copies.mean()), "mean_loss": worth.mean_loss,
            "worst_loss": worth.worst_loss, "shared_inconclusive": float(same.inconclusive.double().mean()),
            "transfer_matrix": white.transfer, **summary(white),
        }  # fmt: skip
        attacks = {"stopping": partial(self.pgd(), loss=capped)}
        if noise == "keyed":
            attacks["nes"] = self.nes()
            if s.decisions:
                attacks["decisions"] = partial(hop_skip_jump, max_queries=s.decisions, generator=self.run.generator())
        for name, attack in attacks.items():
            out |= {f"{name}_{key}": value for key, value in summary(self.attacked(copies, attack)).items()}
        return out

    def attacked(self, copies: list[TracedCopy], attack: Any) -> Trial:
        """An attack on some of the copies, traced."""
        return trial(copies, attack, self.test, sources=range(self.settings.attacked))

    def watermarked(self) -> dict[str, float]:
        """Copies blind to pixels of their own, under the same attack."""
        masks = random_masks(self.settings.copies, self.test[0], self.run.generator())
        return watermarked(self.classifier, masks, self.pgd, self.test, self.data.test, self.settings.attacked)

    def pgd(self) -> Any:
        """The attack by gradients."""
        eps, steps = self.settings.pgd_eps, self.settings.pgd_steps
        return partial(pgd, eps=eps, alpha=eps / 8, steps=steps, clip=(0.0, 1.0), generator=self.run.generator())

    def nes(self) -> Any:
        """The attack by queries of scores."""
        settings = self.settings
        return partial(
            nes, eps=settings.nes_eps, step=0.1 * settings.nes_eps, steps=settings.nes_steps,
            samples=settings.nes_samples, clip=(0.0, 1.0), generator=self.run.generator(),
        )  # fmt: skip


def capped(logits: Tensor, y: Tensor) -> Tensor:
    """The margin up to 0.5: an attacker who stops once his own copy is fooled."""
    return margin(logits, y, cap=0.5)


def summary(found: Trial) -> dict[str, float]:
    """Figures of a trial."""
    return {
        "success": float(found.success.double().mean()), "tracing": found.accuracy,
        "transferred": found.accuracy_transferred, "transfer": found.transfer_rate,
    }  # fmt: skip


def figures(results: Results) -> plots.Figures:
    """Tracing and transfer by kind of copies, and which copies each attack fools."""
    named = {"keyed": "keyed", "random noise": "random", "plain": "plain"}
    traced = {label: (arm, "tracing") for label, arm in named.items()}
    traced["keyed, by scores"] = "keyed", "nes_tracing"
    if results.settings.decisions:
        traced["keyed, by decisions"] = "keyed", "decisions_tracing"
    traced["mask (with the clean image)"] = "mask", "tracing"
    transfer = {label: (arm, "transfer") for label, arm in named.items()}
    transfer |= {f"{arm}, stopping": (arm, "stopping_transfer") for arm in ("keyed", "plain")}
    fooled = {"share of images that fool a copy": results.values("keyed", "transfer_matrix").mean(0)}
    return {
        "tracing": plots.bars(results, traced, ylabel="traced to their source"),
        "transfer": plots.bars(results, transfer, ylabel="fools another copy"),
        "who is fooled": plots.matrices(fooled, xlabel="copy", ylabel="copy that was attacked", digits=2),
    }
