"""Measures norms in a small character transformer whose batches hold one language at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import Backprop, StepRecorder, evaluate
from torchfolio.engine.recipes import adam, one_cycle
from torchfolio.experiments._characters import CharacterModel, Windows, windows
from torchfolio.layers.powernorm import PowerNorm, PowerNormV, SequenceBatchNorm, convert_layernorm
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """A character language model on sentences of two languages."""

    text: str = setting("multi30k", '`"multi30k"`, or `"embedded"` for two tiny made-up languages')
    steps: int = setting(600, "steps of training, one window each")
    length: int = setting(24, "characters of a window")
    dim: int = setting(64, "width of the transformer")
    layers: int = setting(2, "blocks of the transformer")
    lr: float = setting(1e-3, "peak of the one-cycle learning rate")
    warmup: int = setting(100, "steps on batch statistics")
    validation: int = setting(1000, "windows of each language to evaluate on")


SCALES = {
    "smoke": Settings("embedded", steps=20, dim=16, layers=1, warmup=5, validation=8),
    "quick": Settings(),
    "full": Settings(steps=20_000, length=128, dim=256, layers=4, warmup=2000),
}


class WithoutTerm(PowerNorm):
    """The ablation whose gradient leaves the approximate term out."""

    def _see_moments(self, gamma: Tensor, lambda_: Tensor, dy: Tensor, weight: Tensor) -> None:
        super()._see_moments(gamma, lambda_, dy, weight)
        self.nu.zero_()


def train(run: Run[Settings], text: Windows, norm: type[nn.Module] | None) -> dict[str, Any]:
    """Train with one norm, a window at a time: validation loss in evaluation mode, and its gap to training."""
    settings = run.settings
    torch.manual_seed(run.seed)
    net = CharacterModel(text.characters, settings.length, settings.dim, settings.layers)
    if norm is not None:
        extra: dict[str, Any] = {"warmup_steps": settings.warmup} if issubclass(norm, PowerNorm) else {}
        convert_layernorm(net, norm, **extra)
    losses = StepRecorder({"loss": lambda state: state.scalars.get("loss", torch.nan)}, every=1)
    pairs, held = ((t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in (text.train, text.held))
    run.fit(
        net, pairs, rule=Backprop(F.cross_entropy), optimizer=adam(settings.lr, betas=(0.9, 0.98)),
        scheduler=one_cycle(settings.lr), epochs=1, batch_size=1, callbacks=[losses],
    )  # fmt: skip
    curve = losses.to_frame()["loss"].dropna().tolist()  # before the first step there is none
    val = evaluate(net, held, loss=F.cross_entropy, batch_size=100)["loss"]
    last = curve[-min(50, len(curve)) :]
    return {"val": val, "gap": val - sum(last) / len(last), "curve": curve}


def run(run: Run[Settings]) -> None:
    """Train with every norm, and compare the gradients that the two roots give."""
    s = run.settings
    text = windows(s.text, s.length, train=s.steps, held=s.validation, seed=run.seed)
    kinds: dict[str, type[nn.Module] | None] = {
        "layer": None, "batch": SequenceBatchNorm, "batch_statistics": PowerNormV, "power": PowerNorm,
        "without_term": WithoutTerm,
    }  # fmt: skip
    done = {name: run.arm(name, train, run, text, norm) for name, norm in kinds.items()}
    val = {name: arm["val"] for name, arm in done.items()}
    gap = {f"{name}_gap": arm["gap"] for name, arm in done.items()}
    run.values(
        "layernorm", power=val["power"], layer=val["layer"], power_gap=gap["power_gap"], layer_gap=gap["layer_gap"],
        without_term=val["without_term"],
    )  # fmt: skip
    run.values(
        "batchnorm", batch=val["batch"], power=val["power"], batch_gap=gap["batch_gap"], layer_gap=gap["layer_gap"]
    )
    run.values("negative_control", pick(gap, "batch_statistics_gap", "layer_gap"))
    run.values("smaller_gradients", largest_ratio=run.arm("gradients", gradient_ratio, run.seed)["ratio"])


def gradient_ratio(seed: int) -> dict[str, float]:
    """Largest ratio over channels of gradient norms, quadratic mean over standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    x, mean, g = (
        torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((500, 64), (64,), (500, 64))
    )
    x = x + 2 * mean
    sizes = []
    for moment in (x.square().mean(0), x.var(0, correction=0)):
        z = x / moment.sqrt()
        sizes.append(((g - z * (g * z).mean(0)) / moment.sqrt()).norm(dim=0))
    return {"ratio": float((sizes[0] / sizes[1]).max())}


def figures(results: Results) -> plots.Figures:
    """Validation loss and gap by norm."""
    kinds = {"layer": "LayerNorm", "batch": "BatchNorm", "batch_statistics": "PN-V", "power": "PowerNorm"}
    return {
        "validation loss": plots.bars(results, {v: (k, "val") for k, v in kinds.items()}, ylabel="loss (nats)"),
        "gap to training": plots.bars(results, {v: (k, "gap") for k, v in kinds.items()}, ylabel="gap (nats)"),
    }
