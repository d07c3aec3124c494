"""BiPer beside the sign with a straight-through gradient, on one small network with binary weights and activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from torchfolio.data import CropFlip, DataSplits
from torchfolio.efficiency.binary import SignSTEConv2d
from torchfolio.efficiency.biper import BiPerConv2d, laplace_qe, quantization_error, set_stage, sine_decay
from torchfolio.efficiency.compression import without_decay_of_vectors
from torchfolio.efficiency.straight_through import sign, surrogate
from torchfolio.engine import Backprop
from torchfolio.engine.recipes import cosine
from torchfolio.experiments._binary_networks import network, packed
from torchfolio.runs import Results, Run, column, pick, plots, setting
from torchfolio.runs.tasks import Images, accuracy, load


@dataclass(frozen=True)
class Settings(Images):
    """Data, network and budget."""

    train_size: int | None = 3000
    test_size: int | None = 1000
    network: str = setting("plain", '`"plain"` (four binary convolutions) or `"resnet20"` (with shortcuts)')
    widths: tuple[int, ...] = setting((12, 24, 48), "widths of the real first convolution and of the stages")
    frequency: float = setting(20.0, "$\\omega_0$")
    tau: tuple[float, ...] = setting((0.0, 0.0), "weight of the sine decay in the loss, in stage 1 and 2")
    epochs: tuple[int, ...] = setting((5, 3), "number of epochs of stage 1 and 2; the baseline gets their sum")
    lr: tuple[float, ...] = setting((0.02, 0.004), "learning rate of BiPer's stages")
    weight_decay: tuple[float, ...] = setting((5e-4, 5e-5), "weight decay of BiPer's stages")
    sign_lr: tuple[float, ...] = setting((0.05, 0.02), "learning rates that the baseline validates")
    sign_weight_decay: tuple[float, ...] = setting((5e-5, 5e-4), "weight decays that go with them")
    momentum: float = setting(0.9, "momentum of SGD")
    batch_size: int = setting(100, "images in a batch")
    crop: int = setting(0, "pixels of padding before a random crop; flips are always on for photographs")


SCALES = {
    "smoke": Settings(data="digits", train_size=500, test_size=300, val_size=100, image_size=None, epochs=(3, 2)),
    "quick": Settings(),
    "full": Settings(
        train_size=None, test_size=None, val_size=5000, image_size=None, network="resnet20", widths=(16, 32, 64),
        tau=(0.037, 0.0468), epochs=(60, 30), lr=(0.021, 0.0037), weight_decay=(1.6e-3, 1.6e-4), batch_size=256, crop=4,
    ),
}  # fmt: skip


class ConstantSlope(BiPerConv2d):
    """The negative control: the same forward pass, with the gradient times $\\omega_0$ in place of $\\omega_0\\cos$."""

    def effective_weight(self) -> Tensor:
        wave = torch.sin if self.stage == 1 else lambda v: sign(v.sin())
        return surrogate(self.weight, lambda w: wave(self.frequency * w), lambda w: torch.full_like(w, self.frequency))


def run(run: Run[Settings]) -> None:
    """Train every arm, then measure quantisation errors and packed size."""
    data = load(run)
    ste = run.arm("sign_ste", lambda: train_sign(run, data))
    biper = run.arm("biper", lambda: train_stages(run, data, BiPerConv2d))
    single = run.arm("single_stage", lambda: train_single(run, data))
    constant = run.arm("constant_slope", lambda: train_stages(run, data, ConstantSlope))
    ours, baseline = biper["accuracy"], ste["accuracy"]
    run.values("accuracy", biper=ours, sign_ste=baseline, single_stage=single["accuracy"])
    run.values("every_seed", difference=ours - baseline)
    run.values("quantization_error", biper=max(biper["normalized_qe"]), sign_ste=min(ste["normalized_qe"]))
    run.values("size", pick(biper, "weights_ratio", "layers_ratio", "logit_difference"))
    run.values("negative_control", pick(biper, "without_stage_2"), biper=ours, constant_slope=constant["accuracy"])


def train(
    run: Run[Settings], data: DataSplits, net: nn.Module, epochs: int, lr: float, decay: float, tau: float
) -> None:
    """One training at a cosine schedule; scales and norms are not decayed."""
    settings = run.settings

    def loss(output: Tensor, target: Tensor) -> Tensor:
        own = F.cross_entropy(output, target)
        return own + tau * sine_decay(net) if tau else own

    run.fit(
        net, data.train, rule=Backprop(loss), scheduler=cosine(), epochs=epochs, batch_size=settings.batch_size,
        optimizer=lambda ps: SGD(without_decay_of_vectors(ps, decay), lr=lr, momentum=settings.momentum),
        augment=CropFlip(padding=settings.crop, flip=True) if data.shape[0] == 3 else None,
    )  # fmt: skip


def train_stages(run: Run[Settings], data: DataSplits, kind: type[BiPerConv2d]) -> dict[str, Any]:
    """Both stages, with the accuracy of the first, and of its binary weights without a second."""
    settings = run.settings
    net = network(settings.network, data, settings.widths, partial(kind, frequency=settings.frequency))
    knobs = list(zip(settings.epochs, settings.lr, settings.weight_decay, settings.tau, strict=True))
    train(run, data, net, *knobs[0])
    first = accuracy(net, data.test)
    set_stage(net, 2)
    without = accuracy(net, data.test)
    train(run, data, net, *knobs[1])
    return {"accuracy": accuracy(net, data.test), "stage_1": first, "without_stage_2": without,
            **_errors(net), **packed(net, data)}  # fmt: skip


def train_single(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """The ablation: the square wave from the start, for all epochs at stage 1's learning rate."""
    settings = run.settings
    net = network(settings.network, data, settings.widths, partial(BiPerConv2d, frequency=settings.frequency, stage=2))
    train(run, data, net, sum(settings.epochs), settings.lr[0], settings.weight_decay[0], settings.tau[0])
    return {"accuracy": accuracy(net, data.test), **_errors(net)}


def train_sign(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """The baseline at every learning rate; the one that is best on the validation images is reported."""
    settings = run.settings
    arms = []
    for lr, decay in zip(settings.sign_lr, settings.sign_weight_decay, strict=True):
        torch.manual_seed(run.seed)
        net = network(settings.network, data, settings.widths, SignSTEConv2d)
        train(run, data, net, sum(settings.epochs), lr, decay, 0.0)
        scores = {"accuracy": accuracy(net, data.test), "val_accuracy": accuracy(net, data.val)}
        arms.append({**scores, "lr": lr, "weight_decay": decay, **_errors(net)})
    return max(arms, key=lambda arm: arm["val_accuracy"])


def _errors(net: nn.Module) -> dict[str, Any]:
    """Quantisation errors of the binary layers."""
    layers = quantization_error(net).values()
    return {"qe": column(layers, "qe"), "normalized_qe": column(layers, "normalized"), "u": column(layers, "u")}


def figures(results: Results) -> plots.Figures:
    """Accuracies of all arms, and the quantisation error of every layer."""
    arms = {
        "BiPer, two stages": ("biper", "accuracy"),
        "stage 1 (real weights)": ("biper", "stage_1"),
        "square wave from the start": ("single_stage", "accuracy"),
        "sign, straight-through": ("sign_ste", "accuracy"),
        "constant slope": ("constant_slope", "accuracy"),
        "stage 1 made binary": ("biper", "without_stage_2"),
    }
    relative = {"BiPer": ("biper", "normalized_qe"), "sign, straight-through": ("sign_ste", "normalized_qe")}
    layers = plots.curves(results, relative, xlabel="binary layer", ylabel="error over power of the weights")
    layers.axes[0].axhline(1 - 2 / np.pi, ls=":", c="grey")  # sign of Gaussian weights
    law, ax = plots.axes(r"$u = \omega_0\, \mathrm{E}|w|$", "quantisation error")
    u = np.geomspace(0.05, 20, 300)
    ax.semilogx(u, laplace_qe(u), c="grey", label="Laplace weights")
    values = [results.values("biper", name).ravel() for name in ("u", "qe")]
    ax.plot(*values, "C0.", label="trained layers")
    ax.legend()
    return {
        "accuracy": plots.bars(results, arms, ylabel="test accuracy (%)"),
        "error of layers": layers,
        "quantisation error": law,
    }
