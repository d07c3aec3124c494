"""Measures quadratic networks beside ordinary ones of the same structure, with and without ReLinear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from torchfolio.data import DataSplits
from torchfolio.engine import NonFiniteLoss
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._polynomial_varieties import VARIETIES, dimensions
from torchfolio.layers.quadratic import QuadraticConv2d, quadratic_strength, relinear_param_groups, to_quadratic
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import SMOKE, Task, load, train


@dataclass(frozen=True)
class Settings(Task):
    """The common task on a small conv net, and ReLinear's knob."""

    train_size: int | None = 4000
    test_size: int | None = 1000
    epochs: int = 5
    batch_size: int = 64
    weight_decay: float = 1e-4
    lr: float = 0.03
    lr_norm: float = setting(0.1, "learning rate with batch normalisation; `lr` is that without")
    widths: tuple[int, ...] = setting((12, 24, 24, 48), "channels of the convolutions, which stride 1, 2, 1, 2")
    gamma: float = setting(0.1, "factor of the quadratic terms' rate")
    sweep: tuple[float, ...] = setting((0.0, 0.01, 0.1), "factors of the transition")


SCALES = {
    "smoke": Settings(**SMOKE, epochs=1, widths=(4, 8)),
    "quick": Settings(),
    "full": Settings(train_size=None, test_size=None, image_size=None, epochs=30, crop=4, widths=(32, 64, 64, 128)),
}


def network(run: Run[Settings], data: DataSplits, *, norm: bool, init: str = "ordinary") -> nn.Sequential:
    """The conv net; its convolutions are ordinary, or quadratic with the initialisation `init`."""
    torch.manual_seed(run.seed)
    layers: list[nn.Module] = []
    for k, (channels, width) in enumerate(pairwise((data.shape[0], *run.settings.widths))):
        layers.append(nn.Conv2d(channels, width, 3, stride=1 + k % 2, padding=1))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(run.settings.widths[-1], 10))
    for layer in net:
        if isinstance(layer, nn.Conv2d):  # as the authors draw them
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    if init != "ordinary":
        to_quadratic(net, where=lambda name, layer: isinstance(layer, nn.Conv2d))
        for layer in net.modules():
            if isinstance(layer, QuadraticConv2d) and init == "random":
                layer.init = init
                layer.reset_parameters()
    return net


def trained(
    run: Run[Settings], data: DataSplits, *, norm: bool, init: str = "ordinary", gamma: float = 1.0
) -> dict[str, object]:
    """Train one network: accuracy in percent, and the strength of its quadratic parts; chance where it diverged."""
    settings = run.settings
    net = network(run, data, norm=norm, init=init)
    lr = settings.lr_norm if norm else settings.lr
    optimizer = sgd(lr, weight_decay=settings.weight_decay)
    own: Any = net.parameters() if init == "ordinary" else relinear_param_groups(
        net, lr, gamma=gamma, weight_decay=settings.weight_decay
    )  # fmt: skip
    try:
        result = train(
            settings, data, net, seed=run.seed, device=run.device, optimizer=optimizer(own), scheduler=cosine(),
            augment=None,
        )  # fmt: skip
    except NonFiniteLoss:
        return {"accuracy": 100 / data.num_classes, "finite": 0.0, "strength": math.nan}
    outcome: dict[str, object] = {"accuracy": result["accuracy"], "finite": float(math.isfinite(result["loss"]))}
    if init != "ordinary":
        shares = quadratic_strength(net, data.val.tensors[0][:256].to(run.device))
        outcome["strength"] = sum(shares.values()) / len(shares)
    return outcome


def run(run: Run[Settings]) -> None:
    """Train every kind with and without normalisation, sweep the knob, take dimensions."""
    settings, data = run.settings, load(run)
    arms = {}
    for name, norm in (("plain", False), ("norm", True)):
        arms[name] = run.arm(name, trained, run, data, norm=norm)
        for init in ("relinear", "random"):
            gamma = settings.gamma if init == "relinear" else 1.0
            arms[f"{init}_{name}"] = run.arm(f"{init}_{name}", trained, run, data, norm=norm, init=init, gamma=gamma)
    accuracy = {name: arm["accuracy"] for name, arm in arms.items()}
    run.values("accuracy", plain=accuracy["plain"], quadratic_plain=accuracy["relinear_plain"], norm=accuracy["norm"],
               quadratic_norm=accuracy["relinear_norm"],
               finite=min(arms["relinear_plain"]["finite"], arms["relinear_norm"]["finite"]))  # fmt: skip
    run.values("negative_control", pick(accuracy, "random_plain", "random_norm"),
               quadratic_norm=accuracy["relinear_norm"])  # fmt: skip
    strengths = {}
    for gamma in settings.sweep:
        same, own = gamma == settings.gamma, {"norm": True, "init": "relinear", "gamma": gamma}
        done = arms["relinear_norm"] if same else run.arm(f"gamma {gamma:g}", trained, run, data, **own)
        strengths[f"gamma_{gamma:g}".replace(".", "")] = done["strength"]
    run.values("transition", strengths)
    found = run.arm("varieties", dimensions, run.seed)["dimensions"]
    gains = [quadratic - squared for squared, quadratic in found]
    wanted = [pair for _, *pair in VARIETIES]
    wrong = sum(a != b for pair in zip(found, wanted, strict=True) for a, b in zip(*pair, strict=True))
    run.values("expressivity", wrong_entries=wrong, least_gain=min(gains), largest_gain=max(gains))


def figures(results: Results) -> plots.Figures:
    """Accuracy by kind and normalisation."""
    names = ("plain", "relinear_plain", "random_plain", "norm", "relinear_norm", "random_norm")
    scores = {name.replace("_", " "): (name, "accuracy") for name in names}
    return {"accuracy": plots.bars(results, scores, ylabel="test accuracy (%)")}
