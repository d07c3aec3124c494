"""BiPer beside the sign with a straight-through gradient, on one small network with binary weights and activations.

Longer than most because the sign with a straight-through gradient and the controls of its two stages are built here.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from torchfolio.data import DataSplits
from torchfolio.data.augment import CropFlip
from torchfolio.efficiency.binary import BinaryLayer, SignSTEConv2d, export_binary, load_binary
from torchfolio.efficiency.biper import BiPerConv2d, laplace_qe, quantization_error, set_stage, sine_decay
from torchfolio.efficiency.compression import without_decay_of_vectors
from torchfolio.efficiency.straight_through import sign, surrogate
from torchfolio.engine import Backprop, evaluate, fit
from torchfolio.runs import Results, Run

Conv = Callable[..., BinaryLayer]


@dataclass(frozen=True)
class Settings:
    """Data, network and budget.

    Attributes:
        data: name of the data set.
        train_size: training images; `None` takes all.
        test_size: test images; `None` takes all.
        val_size: images held out of the training part.
        image_size: images are box-downsampled to this side; `None` keeps them.
        network: `"plain"` (four binary convolutions) or `"resnet20"` (shortcut around every binary convolution).
        widths: of the real first convolution and the two stages of the plain network.
        frequency: $\\omega_0$.
        tau: weight of the sine decay in the loss, in stage 1 and 2.
        epochs: of stage 1 and 2; the baseline gets their sum.
        lr: of BiPer's stages.
        weight_decay: of BiPer's stages.
        sign_lr: learning rates the baseline may choose from on the validation images.
        sign_weight_decay: weight decays that go with them.
        momentum: of SGD.
        batch_size: images in a batch.
        crop: pixels of padding before a random crop; flips are always on for photographs.
    """

    data: str = "cifar10"
    train_size: int | None = 3000
    test_size: int | None = 1000
    val_size: int = 1000
    image_size: int | None = 16
    network: str = "plain"
    widths: tuple[int, ...] = (12, 24, 48)
    frequency: float = 20.0
    tau: tuple[float, ...] = (0.0, 0.0)
    epochs: tuple[int, ...] = (5, 3)
    lr: tuple[float, ...] = (0.02, 0.004)
    weight_decay: tuple[float, ...] = (5e-4, 5e-5)
    sign_lr: tuple[float, ...] = (0.05, 0.02)
    sign_weight_decay: tuple[float, ...] = (5e-5, 5e-4)
    momentum: float = 0.9
    batch_size: int = 100
    crop: int = 0


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


class BinaryUnit(nn.Module):
    """Binary convolution, batch norm, a shortcut around both, hardtanh; the shortcut pools and pads with zeros."""

    def __init__(self, conv: Conv, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.stride, self.missing = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        return F.hardtanh(self.norm(self.conv(x)) + F.pad(shortcut, (0, 0, 0, 0, 0, self.missing)))


def network(settings: Settings, data: DataSplits, conv: Conv) -> nn.Module:
    """The task's network, real in its first convolution and its head."""
    first, *stages = settings.widths
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    real = nn.Conv2d(data.shape[0], first, 3, padding=1, bias=False)
    parts["stem"] = nn.Sequential(real, nn.BatchNorm2d(first), nn.Hardtanh())
    if settings.network == "resnet20":
        width = first
        for stage, wanted in enumerate(settings.widths):
            for k in range(6):
                parts[f"unit{len(parts)}"] = BinaryUnit(conv, width, wanted, 2 if stage and not k else 1)
                width = wanted
        parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, data.num_classes))
        return nn.Sequential(parts)
    if settings.network != "plain":
        raise ValueError(f"expected the network plain or resnet20, got {settings.network!r}")
    width, side = first, data.shape[-1]
    for wanted in stages:
        for pool in (False, True):
            layer = conv(width, wanted, 3, padding=1, bias=False)
            pooled = [nn.MaxPool2d(2)] if pool else []
            parts[f"layer{len(parts)}"] = nn.Sequential(layer, *pooled, nn.BatchNorm2d(wanted), nn.Hardtanh())
            width = wanted
        side //= 2
    parts["head"] = nn.Sequential(nn.Flatten(), nn.Linear(width * side * side, data.num_classes))
    return nn.Sequential(parts)


def run(run: Run[Settings]) -> None:
    """Train every arm, then measure quantisation errors and packed size."""
    settings = run.settings
    data = run.data(
        settings.data, train_size=settings.train_size, test_size=settings.test_size, val=settings.val_size,
        image_size=settings.image_size,
    )  # fmt: skip
    ste = run.arm("sign_ste", lambda: train_sign(run, data))
    biper = run.arm("biper", lambda: train_stages(run, data, BiPerConv2d))
    single = run.arm("single_stage", lambda: train_single(run, data))
    constant = run.arm("constant_slope", lambda: train_stages(run, data, ConstantSlope))
    ours, baseline = biper["accuracy"], ste["accuracy"]
    run.values("accuracy", {"biper": ours, "sign_ste": baseline, "single_stage": single["accuracy"]})
    run.values("every_seed", {"difference": ours - baseline})
    run.values(
        "quantization_error",
        {"biper": max(biper["normalized_qe"]), "sign_ste": min(ste["normalized_qe"])},
    )
    run.values(
        "size",
        {name: biper[name] for name in ("weights_ratio", "layers_ratio", "logit_difference")},
    )
    run.values(
        "negative_control",
        {"biper": ours, "without_stage_2": biper["without_stage_2"], "constant_slope": constant["accuracy"]},
    )


def train(
    run: Run[Settings], data: DataSplits, net: nn.Module, epochs: int, lr: float, decay: float, tau: float
) -> None:
    """One training at a cosine schedule; scales and norms are not decayed."""
    settings: Settings = run.settings

    def loss(output: Tensor, target: Tensor) -> Tensor:
        own = F.cross_entropy(output, target)
        return own + tau * sine_decay(net) if tau else own

    fit(
        net,
        data.train,
        rule=Backprop(loss),
        optimizer=partial(_sgd, lr=lr, momentum=settings.momentum, weight_decay=decay),
        scheduler=partial(CosineAnnealingLR, T_max=epochs * -(-len(data.train) // settings.batch_size)),
        epochs=epochs,
        batch_size=settings.batch_size,
        augment=CropFlip(padding=settings.crop, flip=True) if data.shape[0] == 3 else None,
        seed=run.seed,
        device=str(run.device),
    )


def _sgd(parameters: Iterable[nn.Parameter], weight_decay: float, lr: float, momentum: float) -> Optimizer:
    return SGD(without_decay_of_vectors(parameters, weight_decay), lr=lr, momentum=momentum)


def accuracy(net: nn.Module, examples: object) -> float:
    """Accuracy in percent."""
    return 100 * evaluate(net, examples)["accuracy"]  # pyright: ignore[reportArgumentType]


def train_stages(run: Run[Settings], data: DataSplits, kind: type[BiPerConv2d]) -> dict[str, object]:
    """Both stages, with the accuracy of the first, and of its binary weights without a second."""
    settings: Settings = run.settings
    net = network(settings, data, partial(kind, frequency=settings.frequency))
    knobs = list(zip(settings.epochs, settings.lr, settings.weight_decay, settings.tau, strict=True))
    train(run, data, net, *knobs[0])
    first = accuracy(net, data.test)
    set_stage(net, 2)
    without = accuracy(net, data.test)
    train(run, data, net, *knobs[1])
    return {"accuracy": accuracy(net, data.test), "stage_1": first, "without_stage_2": without,
            **_errors(net), **_packed(net, data)}  # fmt: skip


def train_single(run: Run[Settings], data: DataSplits) -> dict[str, object]:
    """The ablation: the square wave from the start, for all epochs at stage 1's learning rate."""
    settings: Settings = run.settings
    net = network(settings, data, partial(BiPerConv2d, frequency=settings.frequency, stage=2))
    train(run, data, net, sum(settings.epochs), settings.lr[0], settings.weight_decay[0], settings.tau[0])
    return {"accuracy": accuracy(net, data.test), **_errors(net)}


def train_sign(run: Run[Settings], data: DataSplits) -> dict[str, object]:
    """The baseline at every learning rate; the one that is best on the validation images is reported."""
    settings: Settings = run.settings
    found: list[tuple[float, dict[str, object]]] = []
    for lr, decay in zip(settings.sign_lr, settings.sign_weight_decay, strict=True):
        torch.manual_seed(run.seed)
        net = network(settings, data, SignSTEConv2d)
        train(run, data, net, sum(settings.epochs), lr, decay, 0.0)
        outcome = {"accuracy": accuracy(net, data.test), "lr": lr, "weight_decay": decay, **_errors(net)}
        found.append((accuracy(net, data.val), outcome))
    return max(found, key=lambda pair: pair[0])[1]


def _errors(net: nn.Module) -> dict[str, object]:
    """Quantisation errors, a list over binary layers each."""
    layers = quantization_error(net).values()
    columns = {"qe": "qe", "normalized_qe": "normalized", "u": "u"}
    return {name: [layer[key] for layer in layers] for name, key in columns.items()}


def _packed(net: nn.Module, data: DataSplits) -> dict[str, float]:
    """Size of the packed layers against float32, and what packing changes of the outputs."""
    net.eval()
    exported = export_binary(net)
    again = load_binary(copy.deepcopy(net), exported).eval()
    x = data.test.tensors[0][:200].to(next(net.parameters()).device)
    with torch.no_grad():
        difference = float((net(x) - again(x)).abs().max())
    real = sum(4 * m.weight.numel() for m in net.modules() if isinstance(m, BinaryLayer))
    bits = sum(t.numel() for name, t in exported.items() if name.endswith(".bits"))
    scales = sum(4 * t.numel() for name, t in exported.items() if name.endswith(".alpha"))
    return {
        "weights_ratio": real / bits,
        "layers_ratio": (real + scales) / (bits + scales),
        "logit_difference": difference,
    }


def figures(results: Results) -> dict[str, Figure]:
    """Accuracies of all arms, and the quantisation error of every layer."""
    return {"accuracy": _accuracies(results), "quantisation error": _quantization(results)}


def _accuracies(results: Results) -> Figure:
    arms = {
        "BiPer, two stages": ("biper", "accuracy"),
        "stage 1 (real weights)": ("biper", "stage_1"),
        "square wave from the start": ("single_stage", "accuracy"),
        "sign, straight-through": ("sign_ste", "accuracy"),
        "constant slope": ("constant_slope", "accuracy"),
        "stage 1 made binary": ("biper", "without_stage_2"),
    }
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for k, (arm, value) in enumerate(arms.values()):
        seeds = results.values(arm, value)
        ax.barh(k, seeds.mean(), color=f"C{k}", alpha=0.6)
        ax.plot(seeds, np.full(len(seeds), k), "k.", markersize=7)
    ax.set_yticks(range(len(arms)), list(arms))
    ax.invert_yaxis()
    ax.set(xlabel="test accuracy (%); dots are seeds")
    ax.grid(axis="x", alpha=0.3)
    return fig


def _quantization(results: Results) -> Figure:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    u = np.geomspace(0.05, 20, 300)
    left.semilogx(u, laplace_qe(u), c="grey", label="Laplace weights")
    left.plot(
        results.values("biper", "u").ravel(), results.values("biper", "qe").ravel(), "C0.", label="trained layers"
    )
    left.set(xlabel=r"$u = \omega_0\, \mathrm{E}|w|$", ylabel="quantisation error", ylim=(0, None))
    left.legend()
    for k, (arm, label) in enumerate((("biper", "BiPer"), ("sign_ste", "sign, straight-through"))):
        values = results.values(arm, "normalized_qe")
        right.errorbar(1 + np.arange(values.shape[1]), values.mean(0), values.std(0), fmt="o", c=f"C{k}", label=label)
    right.axhline(1 - 2 / np.pi, ls=":", c="grey", label="sign of Gaussian weights")
    right.set(xlabel="binary layer", ylabel="error over power of the weights", ylim=(0, None))
    right.legend()
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return fig
