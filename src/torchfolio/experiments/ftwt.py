"""Measures FTWT on small images: accuracy and operations of gated networks beside the dense one and random masks."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.efficiency.ftwt import FTWT, attach_gates, compact, estimate_flops, gated_layers, measure_flops
from torchfolio.efficiency.gated_conv import GatedConv, Gates
from torchfolio.engine import Backprop, LearningRule, seeded
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.measure import count_flops
from torchfolio.models import VGG
from torchfolio.runs import Results, Run, column, plots, setting
from torchfolio.runs.tasks import OwnNetwork, accuracy, own_network


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, network and budget."""

    data: str = setting("mnist10k", "name of the data set")
    val: int = setting(500, "training images held out")
    image_size: int | None = setting(14, "images are box-downsampled to this side; `None` keeps them")
    widths: tuple[tuple[int, ...], ...] = setting(
        ((16, 16), (32, 32), (64,)), "widths of the convolutions, stage by stage; every stage ends in a max pool"
    )
    pretrain: int = setting(4, "epochs of the dense network")
    epochs: int = setting(4, "epochs with gates")
    shares: tuple[float, ...] = setting((0.9, 0.8, 0.7), "r, a share of the heat each")
    lr: tuple[float, ...] = setting(
        (0.1, 0.01), "learning rate of the dense network, and of the network under its gates"
    )
    gate_lr: float = setting(0.1, "learning rate of the gates")
    weight_decay: float = setting(5e-4, "weight decay of weights")


SCALES = {
    "smoke": Settings(data="digits", val=100, image_size=None, widths=((8,), (16,)), pretrain=2, epochs=2),
    "quick": Settings(),
    "full": Settings(
        data="cifar10", val=5000, image_size=None, widths=((64,), (128,), (256, 256), (512, 512), (512, 512)),
        pretrain=60, epochs=60, shares=(0.97, 0.95, 0.9),
    ),
}  # fmt: skip
KINDS = ("softmax", "linear")  # pooled inputs of the gates, normalised by a softmax or as they are


class RandomGates(GatedConv):
    """The negative control: as many filters for every sample, but any, drawn by a generator of the control's own."""

    draws: torch.Generator

    def gates(self, x: Tensor, out: Tensor) -> Gates:
        learned = super().gates(x, out)
        order = torch.rand(learned.mask.shape, generator=self.draws).argsort(1).to(x.device)
        return learned._replace(mask=learned.mask.gather(1, order))


def run(run: Run[Settings]) -> None:
    """Train the dense network once, then gates at every share, with softmax and without."""
    settings = run.settings
    data = run.data(settings.data, val=settings.val, image_size=settings.image_size)
    with seeded(run.seed):
        net = own_network(settings, data, lambda: VGG(settings.widths, data.num_classes, data.shape[0]))
    train(run, data, net, Backprop(), settings.lr[0], settings.pretrain)
    dense = run.arm("dense", lambda: {"accuracy": accuracy(net, data.test)})["accuracy"]
    softmax, linear = (
        [run.arm(f"{kind}_{100 * r:.0f}", gated, run, data, net, r, kind) for r in settings.shares] for kind in KINDS
    )
    arms = softmax + linear
    enough = [arm["accuracy"] for arm in arms if arm["measured"] >= 30]
    run.values("accuracy", dense=dense, best_at_30=max(enough, default=0.0), first=softmax[0]["accuracy"],
               first_reduction=softmax[0]["measured"])  # fmt: skip
    rises = [np.diff(column(kind, saving)).min() for kind in (softmax, linear) for saving in ("estimate", "measured")]
    run.values(
        "budget",
        linear_error=abs(column(linear, "estimate") - column(linear, "measured")).max(),
        softmax_excess=(column(softmax, "measured") - column(softmax, "estimate")).max(),
        least_rise=min(rises),
    )
    run.values("negative_control", dense=dense, learned=softmax[1]["accuracy"], random=softmax[1]["random"])
    run.values("compact", {name: column(arms, name).max() for name in ("difference", "uncounted")})


def train(run: Run[Settings], data: DataSplits, net: nn.Module, rule: LearningRule, lr: float, epochs: int) -> None:
    """SGD and a cosine."""
    optimizer = sgd(lr, weight_decay=run.settings.weight_decay)
    run.fit(net, data.train, rule=rule, optimizer=optimizer, scheduler=cosine(), epochs=epochs)


def gated(run: Run[Settings], data: DataSplits, net: nn.Module, r: float, kind: str) -> dict[str, float]:
    """Accuracy, the saving foretold and measured in percent, and what random masks of equal rate give."""
    settings = run.settings
    model = attach_gates(net, r, softmax=kind == "softmax")
    layers = gated_layers(model).values()
    for layer in layers:
        layer.oracle = True
    targets = accuracy(model, data.test)  # the targets as masks, without training
    for layer in layers:
        layer.oracle = False
    estimate = estimate_flops(net, data.train.tensors[0][:1000], r)
    train(run, data, model, FTWT(gate_lr=settings.gate_lr), settings.lr[1], settings.epochs)
    measured = measure_flops(model, data.test)
    random, draws = copy.deepcopy(model), run.generator()
    for layer in gated_layers(random).values():
        layer.__class__ = RandomGates
        vars(layer)["draws"] = draws
    return {
        "accuracy": accuracy(model, data.test), "targets": targets, "random": accuracy(random, data.test),
        "estimate": 100 * estimate.reduction, "measured": 100 * measured.reduction,
        "with_gates": 100 * measured.reduction_with_gates, **compacted(model, data, measured.per_sample + measured.gates),
    }  # fmt: skip


@torch.no_grad()
def compacted(model: nn.Module, data: DataSplits, counted: Tensor) -> dict[str, float]:
    """Largest difference of the compact network's outputs, one by one, and of its operations from those counted."""
    small = compact(model)
    x = data.test.tensors[0][:50].to(next(model.parameters()).device)
    masked = model.eval()(x)
    apart = torch.cat([small(one) for one in x.split(1)])
    done = torch.tensor([count_flops(small, one) for one in x.split(1)])
    return {"difference": float((masked - apart).abs().max()), "uncounted": float((done - counted[:50]).abs().max())}


def figures(results: Results) -> plots.Figures:
    """Accuracy against the operations saved, and the saving foretold against the one measured."""
    arms = {kind: [f"{kind}_{100 * r:.0f}" for r in results.settings.shares] for kind in KINDS}
    masks = {"gates": "accuracy", "random masks": "random"}
    scores = {
        f"{label}, {kind}": [((arm, "measured"), (arm, score)) for arm in arms[kind]]
        for label, score in masks.items() for kind in KINDS
    }  # fmt: skip
    kept = plots.scatter(results, scores, xlabel="operations saved (%)", ylabel="test accuracy (%)")
    kept.axes[0].axhline(results.values("dense", "accuracy").mean(), c="grey", ls="--")
    savings = {kind: [((arm, "estimate"), (arm, "measured")) for arm in arms[kind]] for kind in KINDS}
    across, up = "saving estimated before training (%)", "saving measured (%)"
    foretold = plots.scatter(results, savings, xlabel=across, ylabel=up)
    foretold.axes[0].axline((30, 30), slope=1, c="grey", ls="--")
    return {"accuracy and operations": kept, "savings": foretold}
