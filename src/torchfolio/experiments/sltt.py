"""Measures SLTT beside backpropagation through time on one small spiking network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from torchfolio.data import CropFlip, DataSplits
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._costs_through_time import peaks_by_length, step_times
from torchfolio.experiments._gradients_through_time import cosines_by_tau, gradients_of_a_late_loss
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import Task, accuracy, load
from torchfolio.spiking.bptt import BPTT, SequenceRule
from torchfolio.spiking.nets import SpikingConvNet, SpikingResNet18
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.sltt import SLTT, gradient_agreement


@dataclass(frozen=True)
class Settings(Task):
    """The common task, by plain SGD and a cosine, and what is measured besides."""

    data: str = "mnist10k"
    train_size: int | None = None
    test_size: int | None = None
    val_size: int = 500
    image_size: int | None = 14
    net: str = setting("convnet", '`"convnet"` (two convolutions) or `"resnet18"` (pre-activation)')
    width: int = setting(16, "channels of the first layer")
    timesteps: int = setting(6, "number of steps T")
    tau: float = setting(1.1, "time constant of the neurons")
    epochs: int = 2
    weight_decay: float = 5e-5
    floor: float = setting(94.0, "percent that SLTT must reach besides, to show that the network learned its task")
    taus: tuple[float, ...] = setting((1.1, 1.25, 2.0, 5.0), "time constants at which gradients are compared")
    lengths: tuple[int, ...] = setting((2, 6, 12), "numbers of steps at which memory is measured")
    control_tau: float = setting(2.0, "time constant in the negative control, slow enough for a cue to last")
    rounds: int = setting(15, "rounds of timing")


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
    settings, data = run.settings, load(run)
    batch, timesteps = batch_of(settings, data, run.device), settings.timesteps

    def make(tau: float | None = None) -> nn.Module:
        return network(settings, data, tau).to(run.device)

    def rules(*names: str) -> dict[str, SequenceRule]:
        return {name: RULES[name](timesteps) for name in names}

    def late() -> dict[str, float]:
        neuron = partial(LIF, tau=settings.control_tau)
        net = SpikingConvNet(data.shape, data.num_classes, (8, 16), neuron, norm=False).to(run.device)
        return gradients_of_a_late_loss(net, batch, rules("bptt", "sltt"), timesteps)

    scores = {name: run.arm(name, train, run, data, name)["accuracy"] for name in RULES}
    run.values("accuracy", pick(scores, "sltt", "bptt"), floor=settings.floor)
    peaks = run.arm("memory", peaks_by_length, make, pick(RULES, "bptt", "sltt"), settings.lengths, batch)
    bptt, sltt = (dict(zip(settings.lengths, peaks[name], strict=True)) for name in ("bptt", "sltt"))
    run.values("memory", sltt_12_over_2=sltt[12] / sltt[2], bptt_over_sltt_at_6=bptt[6] / sltt[6])
    cosines = run.arm("agreement", cosines_by_tau, make, settings.taus, batch, timesteps)["cosine"]
    by_tau = dict(zip(settings.taus, cosines, strict=True))
    run.values("gradient_agreement", tau_1_1=by_tau[1.1], tau_2=by_tau[2.0], tau_5=by_tau[5.0])
    timed = rules("bptt", "sltt", "sltt_2", "sltt_1")
    time = run.arm("time", step_times, make, timed, batch, settings.momentum, settings.rounds)
    run.values("few_backward_steps", pick(scores, "sltt_1_rescaled", "sltt"), time_ratio=time["sltt_1_ratio"])
    run.values("negative_control", run.arm("control", late))


def train(run: Run[Settings], data: DataSplits, name: str) -> dict[str, object]:
    """Train by one rule: accuracies in percent, and how the rule's gradient agrees with BPTT's at the end."""
    s, rule = run.settings, RULES[name](run.settings.timesteps)
    net = network(s, data)
    result = run.fit(
        net, data.train, rule=rule, optimizer=sgd(s.lr, s.momentum, s.weight_decay, nesterov=False), scheduler=cosine(),
        epochs=s.epochs, batch_size=s.batch_size, augment=CropFlip(padding=s.crop, flip=True) if s.crop else None,
    )  # fmt: skip
    agreement = gradient_agreement(net.train(), *batch_of(s, data, run.device), timesteps=s.timesteps)
    return {
        "accuracy": accuracy(net, data.test, rule),
        "val_accuracy": accuracy(net, data.val, rule),
        "loss": result.history.to_frame()["loss"].tolist(),
        "final_cosine": agreement["cosine"],
    }


def figures(results: Results) -> plots.Figures:
    """Memory against the length of the sequence, gradients against leak, accuracy beside time."""
    rules = {"BPTT": ("memory", "bptt"), "SLTT": ("memory", "sltt")}
    cosines = {"at initialisation": ("agreement", "cosine")}
    labels = {
        "BPTT": "bptt", "SLTT": "sltt", "SLTT-2": "sltt_2", "SLTT-1": "sltt_1", "SLTT-1 rescaled": "sltt_1_rescaled",
    }  # fmt: skip
    points = {
        label: (("time", f"{arm.removesuffix('_rescaled')}_ms"), (arm, "accuracy")) for label, arm in labels.items()
    }
    return {
        "memory": plots.curves(results, rules, x=results.settings.lengths, xlabel="time steps T",
                               ylabel="peak saved for backward (MB, one batch)"),
        "gradient agreement": plots.curves(results, cosines, x=results.settings.taus,
                                           xlabel="time constant $\\tau$ (steps)",
                                           ylabel="cosine of SLTT's and BPTT's gradients"),
        "accuracy and time": plots.scatter(results, points, xlabel="time of one training step (ms)",
                                           ylabel="test accuracy (%)"),
    }  # fmt: skip
