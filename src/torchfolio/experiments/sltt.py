"""Measures SLTT beside backpropagation through time on one small spiking network.

Longer than most because memory, gradients, time and the cut in time are each measured apart from accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from torchfolio.data import DataSplits
from torchfolio.data.augment import CropFlip
from torchfolio.engine import fit
from torchfolio.engine.recipes import cosine
from torchfolio.measure import alternate, saved_bytes
from torchfolio.runs import Results, Run, plots
from torchfolio.spiking.bptt import BPTT, SequenceRule
from torchfolio.spiking.losses import SLTTLoss
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
    run.values("accuracy", sltt=accuracy["sltt"], bptt=accuracy["bptt"], floor=settings.floor)
    peaks = run.arm("memory", memory, run, data)
    bptt, sltt = ({length: peaks[name][k] for k, length in enumerate(settings.lengths)} for name in ("bptt", "sltt"))
    run.values("memory", sltt_12_over_2=sltt[12] / sltt[2], bptt_over_sltt_at_6=bptt[6] / sltt[6])
    cosines = run.arm("agreement", agreement, run, data)
    by_tau = dict(zip(settings.taus, cosines["cosine"], strict=True))
    run.values(
        "gradient_agreement",
        {f"tau_{tau:g}".replace(".", "_"): by_tau[tau] for tau in (1.1, 2.0, 5.0)},
    )
    time = run.arm("time", step_time, run, data)
    few = {name: accuracy[name] for name in ("sltt_1_rescaled", "sltt")}
    run.values("few_backward_steps", few | {"time_ratio": time["sltt_1_ratio"]})
    run.values("negative_control", run.arm("control", late_loss, run, data))


def train(run: Run[Settings], data: DataSplits, name: str) -> dict[str, object]:
    """Train by one rule: accuracies in percent, and how the rule's gradient agrees with BPTT's at the end."""
    settings, rule = run.settings, RULES[name](run.settings.timesteps)
    net = network(settings, data)
    optimizer = partial(SGD, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    result = fit(
        net, data.train, rule=rule, optimizer=optimizer, scheduler=cosine(),
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
    rules = {"BPTT": ("memory", "bptt"), "SLTT": ("memory", "sltt")}
    lengths, saved = results.settings.lengths, "peak saved for backward (MB, one batch)"
    cosines = {"at initialisation": ("agreement", "cosine")}
    return {
        "memory": plots.curves(results, rules, x=lengths, xlabel="time steps T", ylabel=saved),
        "gradient agreement": plots.curves(
            results, cosines, x=results.settings.taus, xlabel="time constant $\\tau$ (steps)",
            ylabel="cosine of SLTT's and BPTT's gradients",
        ),
        "accuracy and time": _trade_off(results),
    }  # fmt: skip


def _trade_off(results: Results) -> Figure:
    fig, ax = plots.axes("time of one training step (ms)", "test accuracy (%)")
    names = {
        "bptt": "BPTT",
        "sltt": "SLTT",
        "sltt_2": "SLTT-2",
        "sltt_1": "SLTT-1",
        "sltt_1_rescaled": "SLTT-1 rescaled",
    }
    for arm, label in names.items():
        accuracy = results.values(arm, "accuracy")
        time = results.values("time", f"{arm.removesuffix('_rescaled')}_ms")
        ax.errorbar(time.mean(), accuracy.mean(), yerr=accuracy.std(), fmt="o", markersize=8, capsize=3, label=label)
    ax.set_xlim(0, None)
    ax.legend()
    return fig


def peers(bench: Any) -> None:
    """A training step of the small network, beside backpropagation through time and a loop written by hand."""
    x, y = torch.rand(128, 1, 14, 14), torch.arange(128) % 10

    def net() -> nn.Module:
        return SpikingConvNet((1, 14, 14), 10, (16, 32), partial(LIF, tau=1.1))

    def stepper(rule: SequenceRule) -> Callable[[], Any]:
        rule.prepare(net(), (x, y)).train()
        return lambda: rule.step((x, y), Tensor.backward)

    hand, loss = net(), SLTTLoss()
    for neuron in hand.modules():
        if isinstance(neuron, LIF):
            neuron.detach_state = True

    def loop() -> None:
        reset_state(hand)
        for _ in range(6):
            (loss(hand(x), y) / 6).backward()

    bench.compare(
        "a step of two convolutions, T = 6, 128 images", ours=stepper(SLTT(timesteps=6)),
        by_hand=loop, bptt=stepper(BPTT(timesteps=6)),
    )  # fmt: skip
    bench.compare(
        "the same, backward at one step", ours=stepper(SLTT(timesteps=6, k=1)), bptt=stepper(BPTT(timesteps=6))
    )
