"""Traces attacks on copies of one classifier: keyed tracers against random, plain and shared ones, and a watermark.

Longer than most, for three kinds of attack on four kinds of copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import adam
from torchfolio.robustness import hop_skip_jump, margin, nes, pgd
from torchfolio.robustness.attack_tracing import TracedCopy, Trial, separate, trace, trial, utility
from torchfolio.robustness.attacks import Attack
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.tasks import OwnNetwork, own_network


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """The classifier, its copies, and the attacks.

    Attributes:
        data: set of images.
        epochs: passes of the classifier's training.
        lr: its rate of Adam.
        copies: number of copies.
        steps: steps of the tracers' training.
        attacked: number of copies that are attacked.
        images: test images that each attack starts from.
        pgd_eps: radius of PGD.
        pgd_steps: its steps, of an eighth of the radius.
        nes_eps: radius of NES.
        nes_steps: its steps at most.
        nes_samples: pairs of queries a step.
        decisions: queries of HopSkipJump; 0 leaves it out.
    """

    data: str = "mnist10k"
    epochs: int = 4
    lr: float = 2e-3
    copies: int = 6
    steps: int = 600
    attacked: int = 4
    images: int = 100
    pgd_eps: float = 0.1
    pgd_steps: int = 20
    nes_eps: float = 0.2
    nes_steps: int = 25
    nes_samples: int = 15
    decisions: int = 300


SCALES = {
    "smoke": Settings(data="digits", epochs=3, copies=3, steps=30, attacked=2, images=20, nes_steps=5, decisions=60),
    "quick": Settings(),
    "full": Settings(data="cifar10", epochs=10, copies=10, decisions=2000, pgd_eps=0.03, nes_eps=0.06),
}

ARMS = {"keyed": {"noise": "keyed"}, "random": {"noise": "random"}, "plain": {"noise": None}}


def run(run: Run[Settings]) -> None:
    """Train a classifier, make copies in several ways, attack some of them, and trace."""
    data = run.data(run.settings.data, val=0, normalize=False)
    scene = Scene(run, data)
    found = {name: run.arm(name, scene.copies, settings) for name, settings in ARMS.items()}
    mask = run.arm("mask", scene.masked)
    keyed, random, plain = found["keyed"], found["random"], found["plain"]
    run.values(
        "tracing_white_box", accuracy=keyed["tracing"], success=keyed["success"], transferred=keyed["transferred"]
    )
    decisions = {"by_decisions": keyed["decisions_tracing"]} if run.settings.decisions else {}
    run.values("tracing_black_box", accuracy=keyed["nes_tracing"], success=keyed["nes_success"], **decisions)
    run.values("utility", mean_loss=100 * keyed["mean_loss"], worst_loss=100 * keyed["worst_loss"])
    run.values(
        "negative_control",
        keyed=keyed["tracing"], random=random["tracing"], plain=plain["tracing"], mask=mask["tracing"],
        shared_inconclusive=keyed["shared_inconclusive"],
    )  # fmt: skip
    run.values(
        "deterrence",
        keyed=keyed["transfer"], plain=plain["transfer"], keyed_stopping=keyed["stopping_transfer"],
        plain_stopping=plain["stopping_transfer"],
    )  # fmt: skip


class Scene:
    """The classifier and what happens to its copies."""

    def __init__(self, run: Run[Settings], data: DataSplits) -> None:
        self.run, self.settings, self.data = run, run.settings, data
        self.classifier = self.trained()
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(run.seed))
        x, y = data.test.tensors
        self.test = x[order[: self.settings.images]], y[order[: self.settings.images]]

    def network(self) -> nn.Module:
        """Two convolutions of stride 2 (on small images 3 wide), or a residual network for photographs."""
        from torchfolio.models import ResNetCIFAR

        channels, side = self.data.shape[0], self.data.shape[1]
        kernel = 5 if side >= 16 else 3
        small = ((side - kernel) // 2 + 1 - kernel) // 2 + 1
        return nn.Sequential(
            nn.Conv2d(channels, 16, kernel, 2), nn.ReLU(), nn.Conv2d(16, 32, kernel, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * small**2, self.data.num_classes),
        ) if channels == 1 else ResNetCIFAR(20, num_classes=self.data.num_classes)  # fmt: skip

    def trained(self) -> nn.Module:
        """The classifier that copies are made of."""
        torch.manual_seed(self.run.seed)
        net = own_network(self.settings, self.data, self.network)
        fit(
            net, self.data.train, optimizer=adam(self.settings.lr), epochs=self.settings.epochs, batch_size=64,
            seed=self.run.seed, device=self.run.device,
        )  # fmt: skip
        return net

    def copies(self, how: dict[str, Any]) -> dict[str, Any]:
        """Copies of one kind under attack by gradients; keyed ones by queries too."""
        settings = self.settings
        keys = [1000 * self.run.seed + k for k in range(settings.copies)]
        copies = separate(self.classifier, self.data.train, keys=keys, steps=settings.steps, seed=self.run.seed, **how)
        worth = utility(copies, self.classifier, self.data.test)
        white = self.attacked(copies, self.pgd())
        out = {
            "classifier": worth.classifier, "accuracy": float(worth.copies.mean()), "mean_loss": worth.mean_loss,
            "worst_loss": worth.worst_loss,
            "transfer_matrix": white.transfer, **summary(white),
        }  # fmt: skip
        stopping = summary(self.attacked(copies, partial(self.pgd(), loss=capped)))
        out |= {f"stopping_{key}": value for key, value in stopping.items()}
        if how["noise"] == "keyed":
            out |= {f"nes_{key}": value for key, value in summary(self.attacked(copies, self.nes())).items()}
            out["shared_inconclusive"] = self.shared(copies, white)
            if settings.decisions:
                attack = partial(hop_skip_jump, max_queries=settings.decisions, generator=self.generator())
                out |= {f"decisions_{key}": value for key, value in summary(self.attacked(copies, attack)).items()}
        return out

    def attacked(self, copies: list[TracedCopy], attack: Any) -> Trial:
        return trial(copies, attack, self.test, sources=range(self.settings.attacked))

    def pgd(self) -> Any:
        eps, steps = self.settings.pgd_eps, self.settings.pgd_steps
        return partial(pgd, eps=eps, alpha=eps / 8, steps=steps, clip=(0.0, 1.0), generator=self.generator())

    def nes(self) -> Any:
        settings = self.settings
        return partial(
            nes, eps=settings.nes_eps, step=0.1 * settings.nes_eps, steps=settings.nes_steps,
            samples=settings.nes_samples, clip=(0.0, 1.0), generator=self.generator(),
        )  # fmt: skip

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.run.seed)

    def shared(self, copies: list[TracedCopy], found: Trial) -> float:
        """Share of the traces that are inconclusive among copies that all hold the first one's tracer."""
        same = [copies[0] for _ in copies]
        return float(trace(same, found.x_adv[0], label=found.label).inconclusive.double().mean())

    def masked(self) -> dict[str, float]:
        """A watermark: copy i does not see a random 5% of the pixels, and is betrayed where an attack left them alone.

        It needs the clean image, which tracing does not; and the attack starts there, so that it moves no unseen pixel.
        """
        generator = self.generator()
        x, y = self.test
        masks = [(torch.rand(x.shape[1:], generator=generator) > 0.05).to(x) for _ in range(self.settings.copies)]
        accuracy = [evaluate(Masked(self.classifier, m), self.data.test)["accuracy"] for m in masks]
        right, total = 0.0, 0
        for k in range(self.settings.attacked):
            found: Attack = self.pgd()(Masked(self.classifier, masks[k]), x, y, start="zero")
            change = (found.x_adv - x).abs()
            left = torch.stack([(change * (1 - m)).flatten(1).sum(1) / (1 - m).sum() for m in masks], 1)
            right += float((left.argmin(1) == k)[found.success].sum())
            total += int(found.success.sum())
        return {"tracing": right / max(1, total), "accuracy": sum(accuracy) / len(accuracy)}


class Masked(nn.Module):
    """A classifier that does not see some pixels."""

    mask: Tensor

    def __init__(self, classifier: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x * self.mask)


def capped(logits: Tensor, y: Tensor) -> Tensor:
    """The margin up to 0.5: an attacker who stops once his own copy is fooled."""
    return margin(logits, y, cap=0.5)


def summary(found: Trial) -> dict[str, float]:
    """Figures of a trial."""
    return {
        "success": float(found.success.double().mean()), "tracing": found.accuracy,
        "transferred": found.accuracy_transferred, "transfer": found.transfer_rate,
    }  # fmt: skip


def figures(results: Results) -> dict[str, Figure]:
    """Tracing and transfer by kind of copies, and which copies each attack fools."""
    named = {"keyed": "keyed", "random noise": "random", "plain": "plain"}
    matrix = results.values("keyed", "transfer_matrix").mean(0)
    fig, ax = plots.axes("copy", "copy that was attacked")
    ax.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for (i, j), value in [((i, j), matrix[i, j]) for i in range(matrix.shape[0]) for j in range(matrix.shape[1])]:
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    ax.grid(visible=False)
    return {
        "tracing": plots.bars(
            results,
            {**{k: (arm, "tracing") for k, arm in named.items()}, "keyed, by scores": ("keyed", "nes_tracing"),
             "keyed, by decisions": ("keyed", "decisions_tracing"),
             "mask (with the clean image)": ("mask", "tracing")},
            ylabel="traced to their source",
        ),
        "transfer": plots.bars(
            results,
            {**{k: (arm, "transfer") for k, arm in named.items()}, "keyed, stopping": ("keyed", "stopping_transfer"),
             "plain, stopping": ("plain", "stopping_transfer")},
            ylabel="fools another copy",
        ),
        "who is fooled": fig,
    }  # fmt: skip


def peers(bench: Any) -> None:
    """Six copies by tracers beside six fine-tuned heads, as the implementations of a related method make them."""
    from torchfolio.data import load

    data = load("mnist10k", val=0, normalize=False)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )

    def finetuned() -> None:
        """A watermark of its own and a fine-tuning of the classifier for each copy."""
        import copy

        for seed in range(6):
            mask = (torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(seed)) > 0.05).float()
            fit(Masked(copy.deepcopy(net), mask), data.train, optimizer=adam(1e-3), epochs=1, batch_size=64, seed=seed)

    bench.compare(
        "six copies, 125 steps of 64, MNIST",
        repeats=3,
        ours=lambda: separate(net, data.train, n_copies=6, steps=125),
        finetuning_each=finetuned,
    )
