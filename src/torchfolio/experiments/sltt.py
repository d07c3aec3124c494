"""Measures SLTT beside backpropagation through time on one small spiking network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from torchfolio.data import DataSplits
from torchfolio.data.augment import CropFlip
from torchfolio.engine import fit
from torchfolio.measure import alternate, saved_bytes
from torchfolio.runs import Results, Run
from torchfolio.spiking.bptt import BPTT, SequenceRule
from torchfolio.spiking.nets import SpikingConvNet, SpikingResNet18
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.sequence import run_sequence
from torchfolio.spiking.sltt import SLTT, gradient_agreement
from torchfolio.spiking.state import reset_state


@dataclass(frozen=True)
class Settings:
    """Data, network and budget.

    Attributes:
        data: name of the data set.
        train_size: training images; `None` takes all.
        test_size: test images; `None` takes all.
        val_size: images held out of the training part.
        image_size: images are box-downsampled to this side; `None` keeps them.
        net: `"convnet"` (two convolutions) or `"resnet18"` (pre-activation).
        width: channels of the first layer.
        timesteps: T.
        tau: time constant of the neurons.
        epochs: passes over the training images.
        batch_size: images in a batch.
        lr: first learning rate of the cosine schedule.
        momentum: of SGD.
        weight_decay: of all weights.
        crop: pixels of padding before a random crop and flip; 0 leaves images as they are.
        floor: percent that SLTT must reach besides, to show that the network learned its task.
        taus: time constants at which gradients are compared.
        lengths: numbers of steps at which memory is measured.
        control_tau: time constant in the negative control, slow enough for a cue to last.
        rounds: of timing.
    """

    data: str = "mnist10k"
    train_size: int | None = None
    test_size: int | None = None
    val_size: int = 500
    image_size: int | None = 14
    net: str = "convnet"
    width: int = 16
    timesteps: int = 6
    tau: float = 1.1
    epochs: int = 2
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-5
    crop: int = 0
    floor: float = 94.0
    taus: tuple[float, ...] = (1.1, 1.25, 2.0, 5.0)
    lengths: tuple[int, ...] = (2, 6, 12)
    control_tau: float = 2.0
    rounds: int = 15


SCALES = {
    "smoke": Settings(
        data="digits", train_size=512, val_size=100, image_size=None, width=8, epochs=4, batch_size=64, rounds=5
    ),
    "quick": Settings(),
    "full": Settings(
        data="cifar10", val_size=5000, image_size=None, net="resnet18", timesteps=4, epochs=30, crop=4, floor=80.0
    ),
}

RULES: dict[str, Callable[[int], SequenceRule]] = {
    "bptt": lambda timesteps: BPTT(timesteps=timesteps),
    "sltt": lambda timesteps: SLTT(timesteps=timesteps),
    "sltt_2": lambda timesteps: SLTT(timesteps=timesteps, k=2),
    "sltt_1": lambda timesteps: SLTT(timesteps=timesteps, k=1),
    "sltt_1_rescaled": lambda timesteps: SLTT(timesteps=timesteps, k=1, rescale=True),
}


def network(settings: Settings, data: DataSplits, tau: float | None = None) -> nn.Module:
    """The spiking network, with another time constant if given."""
    neuron = partial(LIF, tau=settings.tau if tau is None else tau)
    if settings.net == "resnet18":
        return SpikingResNet18(data.num_classes, data.shape[0], settings.width, neuron)
    return SpikingConvNet(data.shape, data.num_classes, (settings.width, 2 * settings.width), neuron)


def batch_of(settings: Settings, data: DataSplits, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first training batch; a copy, since a slice would share the storage of the whole set."""
    x, y = (tensor[: settings.batch_size].clone().to(device) for tensor in data.train.tensors)
    return x, y


def run(run: Run[Settings]) -> None:
    """Train by every rule, then compare gradients, memory and time, and cut a cue from its reward."""
    settings = run.settings
    data = run.data(
        settings.data, train_size=settings.train_size, test_size=settings.test_size, val=settings.val_size,
        image_size=settings.image_size,
    )  # fmt: skip
    accuracy = {name: run.arm(name, train, run, data, name)["accuracy"] for name in RULES}
    run.values(
        "accuracy",
        {"sltt": accuracy["sltt"], "bptt": accuracy["bptt"], "floor": settings.floor},
    )
    _memory(run, run.arm("memory", memory, run, data))
    cosines = run.arm("agreement", agreement, run, data)
    by_tau = dict(zip(settings.taus, cosines["cosine"], strict=True))
    run.values(
        "gradient_agreement",
        {f"tau_{tau:g}".replace(".", "_"): by_tau[tau] for tau in (1.1, 2.0, 5.0)},
    )
    time = run.arm("time", step_time, run, data)
    run.values(
        "few_backward_steps",
        {
            "sltt_1_rescaled": accuracy["sltt_1_rescaled"],
            "sltt": accuracy["sltt"],
            "time_ratio": time["sltt_1_ratio"],
        },
    )
    control = run.arm("control", late_loss, run, data)
    run.values("negative_control", {"sltt": control["sltt"], "bptt": control["bptt"]})


def train(run: Run[Settings], data: DataSplits, name: str) -> dict[str, object]:
    """Train by one rule: accuracies in percent, and how the rule's gradient agrees with BPTT's at the end."""
    settings, rule = run.settings, RULES[name](run.settings.timesteps)
    net = network(settings, data)
    steps = settings.epochs * -(-len(data.train) // settings.batch_size)
    optimizer = partial(SGD, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    result = fit(
        net, data.train, rule=rule, optimizer=optimizer, scheduler=partial(_cosine, steps=steps),
        epochs=settings.epochs, batch_size=settings.batch_size, seed=run.seed, device=str(run.device),
        augment=CropFlip(padding=settings.crop, flip=True) if settings.crop else None,
    )  # fmt: skip
    agreement = gradient_agreement(net.train(), *batch_of(settings, data, run.device), timesteps=settings.timesteps)
    return {
        "accuracy": 100 * rule.evaluate(net, data.test)["accuracy"],
        "val_accuracy": 100 * rule.evaluate(net, data.val)["accuracy"],
        "loss": result.history.to_frame()["loss"].tolist(),
        "final_cosine": agreement["cosine"],
    }


def _cosine(optimizer: Optimizer, steps: int) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, T_max=steps)


def memory(run: Run[Settings], data: DataSplits) -> dict[str, object]:
    """Peak megabytes that one batch saves for backward, at every length of the sequence."""
    settings, batch = run.settings, batch_of(run.settings, data, run.device)
    peaks: dict[str, object] = {}
    for name in ("bptt", "sltt"):
        values = []
        for timesteps in settings.lengths:
            rule = RULES[name](timesteps)
            net = rule.prepare(network(settings, data).to(run.device), batch)
            saved = saved_bytes(lambda rule=rule: rule.step(batch, Tensor.backward), exclude=net)
            values.append(saved.peak / 1e6)
        peaks[name] = values
    return peaks


def _memory(run: Run[Settings], peaks: dict[str, list[float]]) -> None:
    at = {length: k for k, length in enumerate(run.settings.lengths)}
    run.values(
        "memory",
        {
            "sltt_12_over_2": peaks["sltt"][at[12]] / peaks["sltt"][at[2]],
            "bptt_over_sltt_at_6": peaks["bptt"][at[6]] / peaks["sltt"][at[6]],
        },
    )


def agreement(run: Run[Settings], data: DataSplits) -> dict[str, object]:
    """Cosine of the two gradients at initialisation, for every time constant on the same weights."""
    settings, batch = run.settings, batch_of(run.settings, data, run.device)
    weights = network(settings, data).to(run.device).state_dict()
    cosines = []
    for tau in settings.taus:
        net = network(settings, data, tau).to(run.device)
        net.load_state_dict(weights)
        cosines.append(gradient_agreement(net, *batch, timesteps=settings.timesteps)["cosine"])
    return {"cosine": cosines}


def step_time(run: Run[Settings], data: DataSplits) -> dict[str, float]:
    """Milliseconds of a training step by every rule, and their ratios to BPTT's, timed in turn."""
    settings, batch = run.settings, batch_of(run.settings, data, run.device)

    def stepper(name: str) -> Callable[[], None]:
        rule = RULES[name](settings.timesteps)
        net = rule.prepare(network(settings, data).to(run.device), batch).train()
        optimizer = SGD(net.parameters(), lr=1e-3, momentum=settings.momentum)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            rule.step(batch, Tensor.backward)
            optimizer.step()

        return step

    names = ("bptt", "sltt", "sltt_2", "sltt_1")
    steppers: dict[str, Any] = {name: stepper(name) for name in names}
    timed = alternate(**steppers, repeats=settings.rounds)
    times = {f"{name}_ms": 1e3 * median(timed.seconds[name]) for name in names}
    return times | {f"{name}_ratio": timed.ratio(name) for name in names[1:]}


def late_loss(run: Run[Settings], data: DataSplits) -> dict[str, float]:
    """Largest gradient of the first layer's weights when the image comes at the first step, the loss at the last."""
    settings = run.settings
    x, y = batch_of(settings, data, run.device)
    net = SpikingConvNet(
        data.shape, data.num_classes, (8, 16), partial(LIF, tau=settings.control_tau), norm=False
    ).to(run.device)  # fmt: skip
    cue = torch.zeros(settings.timesteps, *x.shape, device=run.device)
    cue[0] = x
    first = next(net.parameters())
    found = {}
    for name in ("bptt", "sltt"):
        rule = RULES[name](settings.timesteps)
        rule.prepare(net, (x, y))
        reset_state(net)
        net.zero_grad(set_to_none=True)
        F.cross_entropy(run_sequence(net, cue)[-1], y).backward()
        found[name] = 0.0 if first.grad is None else float(first.grad.abs().max())
        rule.release()
    return found


def figures(results: Results) -> dict[str, Figure]:
    """Memory against the length of the sequence, gradients against leak, accuracy beside time."""
    return {
        "memory": _memory_figure(results),
        "gradient agreement": _agreement_figure(results),
        "accuracy and time": _trade_off(results),
    }


def _memory_figure(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, label in (("bptt", "BPTT"), ("sltt", "SLTT")):
        ax.plot(results.settings.lengths, results.values("memory", name).mean(0), marker="o", label=label)
    ax.set(xlabel="time steps T", ylabel="peak saved for backward (MB, one batch)", xlim=(0, None), ylim=(0, None))
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def _agreement_figure(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
    cosines = results.values("agreement", "cosine")
    ax.errorbar(results.settings.taus, cosines.mean(0), yerr=cosines.std(0), marker="o", capsize=3)
    ax.set(
        xlabel="time constant $\\tau$ (steps)",
        ylabel="cosine of SLTT's and BPTT's gradients",
        title="at initialisation",
    )
    ax.grid(alpha=0.3)
    return fig


def _trade_off(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
    shown = (
        ("bptt", "bptt", "BPTT"),
        ("sltt", "sltt", "SLTT"),
        ("sltt_2", "sltt_2", "SLTT-2"),
        ("sltt_1", "sltt_1", "SLTT-1"),
        ("sltt_1_rescaled", "sltt_1", "SLTT-1 rescaled"),
    )
    for arm, timed, label in shown:
        accuracy, time = results.values(arm, "accuracy"), results.values("time", f"{timed}_ms")
        ax.errorbar(time.mean(), accuracy.mean(), yerr=accuracy.std(), fmt="o", markersize=8, capsize=3, label=label)
    ax.set(xlabel="time of one training step (ms)", ylabel="test accuracy (%)", xlim=(0, None))
    ax.legend()
    ax.grid(alpha=0.3)
    return fig
