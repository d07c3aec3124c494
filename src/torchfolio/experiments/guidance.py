"""Measures guidance of networks that overfit or do not train, by trained, untrained and wrongly paired guides.

The main task is a wide perceptron on small images with a residual network as guide. The weight of the alignment is
chosen on the validation images, by the loss under an untrained guide. Deeper targets follow, and at full scale two
sequence tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torchfolio.experiments._guidance_sequences import TASKS, learn_sequences
from torchfolio.experiments._guided_targets import KINDS, deep_perceptron, learn, no_skips, shuffled, wide
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import Images, load


@dataclass(frozen=True)
class Settings(Images):
    """Data, of which the validation images choose the weight, networks and budget."""

    train_size: int | None = 4000
    hidden: tuple[int, ...] = setting((512, 512, 512), "widths of the target's hidden layers")
    guide_widths: tuple[int, ...] = setting((8, 16, 32), "channels of the guide's three stages")
    epochs: int = setting(10, "passes over the training images")
    batch_size: int = setting(256, "images in a batch; CKA depends on it")
    lr: float = setting(1e-3, "learning rate of the target's Adam")
    guide_epochs: int = setting(8, "number of epochs of training the guide")
    guide_lr: float = setting(3e-3, "learning rate of the guide's Adam, at the start of a cosine decay")
    guide_batch_size: int = setting(64, "images in a batch of the guide's training")
    alphas: tuple[float, ...] = setting((3.0, 10.0, 30.0), "weights of the alignment to choose from")
    early_steps: int = setting(100, "steps of guidance as initialisation")
    deep_layers: int = setting(48, "hidden layers of the deep perceptron")
    stage_layers: int = setting(12, "convolutions in each of the three stages of the network without skip connections")
    sequence_examples: int = setting(0, "training examples of the sequence tasks; 0 leaves them out")
    sequence_epochs: int = setting(20, "passes over them")
    lengths: tuple[int, int] = setting((5, 12), "shortest and longest sequence")


SCALES = {
    "smoke": Settings(
        data="digits", train_size=512, val_size=100, test_size=None, image_size=None, hidden=(64, 64), batch_size=64,
        guide_widths=(4, 8, 16), epochs=3, guide_epochs=2, alphas=(1.0, 10.0), early_steps=10,
        deep_layers=8, stage_layers=2, sequence_examples=128, sequence_epochs=1,
    ),
    "quick": Settings(),
    "full": Settings(
        train_size=20_000, val_size=2000, test_size=None, image_size=None, sequence_examples=20_000
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train the target plainly and under every guide."""
    settings, data = run.settings, load(run)
    guided = partial(learn, run, data, wide, "untrained")
    plain = run.arm("plain", learn, run, data, wide, "plain")
    tried = {alpha: run.arm(f"alpha_{alpha:g}", guided, alpha=alpha) for alpha in settings.alphas}
    alpha = min(tried, key=lambda a: tried[a]["val_loss"])
    arms = {
        "plain": plain,
        "untrained": run.arm("untrained", lambda: {**tried[alpha], "alpha": alpha}),
        "trained": run.arm("trained", learn, run, data, wide, "trained", alpha=alpha),
        "early": run.arm("early", guided, alpha=alpha, steps=settings.early_steps),
        "permuted": run.arm("permuted", guided, alpha=alpha, guide_input=shuffled(run.seed)),
    }
    score = {name: arm["accuracy"] for name, arm in arms.items()}
    loss = {f"{name}_loss": arm["loss"] for name, arm in arms.items()}
    losses = pick(loss, "trained_loss", "untrained_loss", "plain_loss")
    run.values("overfitting", pick(score, "trained", "plain"), **losses)
    run.values("untrained_guide", pick(score, "untrained", "plain"), **pick(loss, "untrained_loss", "plain_loss"))
    run.values("early_guidance", pick(loss, "early_loss", "plain_loss"))
    run.values("negative_control", pick(score, "permuted", "plain"), **pick(loss, "permuted_loss", "untrained_loss"))
    for id, make in {"deep_perceptron": deep_perceptron, "no_skips": no_skips}.items():  # which train badly alone
        deep = partial(learn, run, data, make, alpha=alpha, reduction="mean")
        run.values(id, {kind: run.arm(f"{id}_{kind}", deep, kind)["accuracy"] for kind in KINDS})
    if settings.sequence_examples:
        cases = [(task, kind) for task in TASKS for kind in KINDS]
        values = {f"{t}_{k}": run.arm(f"{t}_{k}", learn_sequences, run, t, k)["accuracy"] for t, k in cases}
        run.values("sequences", values)


def figures(results: Results) -> plots.Figures:
    """Validation loss through training, final accuracy, and the choice of the weight."""
    settings, nats = results.settings, "validation loss (nats)"
    arms = {
        "plain": "plain", "untrained guide": "untrained", "trained guide": "trained",
        "untrained guide, early steps": "early", "guide sees other images": "permuted",
    }  # fmt: skip
    courses, scores = ({label: (arm, key) for label, arm in arms.items()} for key in ("val_losses", "accuracy"))
    alphas = sorted(settings.alphas)
    chosen = {"untrained guide": [(f"alpha_{alpha:g}", "val_loss") for alpha in alphas]}
    weight: dict[str, Any] = {"x": alphas, "levels": {"plain": ("plain", "val_loss")}, "logx": True}
    pictures = {
        "overfitting": plots.curves(results, courses, xlabel="epoch", ylabel=nats),
        "accuracy": plots.bars(results, scores, ylabel="test accuracy (%)"),
        "weight": plots.curves(results, chosen, xlabel="weight α of the alignment", ylabel=nats, **weight),
    }
    targets: dict[str, tuple[str, ...]] = {"deep targets": ("deep_perceptron", "no_skips")}
    if settings.sequence_examples:
        targets["sequences"] = tuple(TASKS)
    for title, names in targets.items():
        series = {kind: {name.replace("_", " "): (f"{name}_{kind}", "accuracy") for name in names} for kind in KINDS}
        pictures[title] = plots.groups(results, series, ylabel="test accuracy (%)")
    return pictures
