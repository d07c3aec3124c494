"""Measures growth by mixtures of learned templates beside other starts of the added weights, on a wide residual net."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from torchfolio.data import DataSplits
from torchfolio.efficiency.mixture_growth import (
    GrowableModel,
    TemplateLayer,
    grow_by_tiling,
    net2net_widen,
    param_groups,
    templatize,
)
from torchfolio.engine import seeded
from torchfolio.engine.recipes import one_cycle
from torchfolio.experiments._wide_resnet import wide_resnet
from torchfolio.measure import count_flops
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import SMOKE, Task, accuracy, load, train


@dataclass(frozen=True)
class Settings(Task):
    """The common task, for a pre-activation wide residual network."""

    train_size: int | None = 6000
    epochs: int = setting(10, "passes for each member")
    growth_epochs: int = setting(4, "passes after growth")
    growth_lr: float = setting(0.02, "peak of the learning rate after growth")
    weight_decay: float = 5e-4
    templates: int = setting(4, "number of templates of each set")
    width: int = setting(1, "factor on the widths 16, 32, 64 of the stages")
    blocks: int = setting(1, "residual blocks of a stage")
    net2net: bool = setting(False, "whether to widen a member by Net2Net besides")


SCALES = {
    "smoke": Settings(**SMOKE, epochs=2, growth_epochs=1, net2net=True),
    "quick": Settings(),
    "full": Settings(
        train_size=None, test_size=None, val_size=5000, image_size=None, crop=4, epochs=60, growth_epochs=20,
        width=4, blocks=2, net2net=True,
    ),
}  # fmt: skip


def wide_network(settings: Settings, data: DataSplits) -> nn.Sequential:
    """The network of full width."""
    return wide_resnet(data.shape[0], data.num_classes, settings.width, settings.blocks)


def growable(run: Run[Settings], data: DataSplits, members: Mapping[str, Any] | None = None) -> GrowableModel:
    """The network in templates, as the seed draws it, or with the weights of trained members."""
    with seeded(run.seed):
        model = templatize(wide_network(run.settings, data), data.train.tensors[0][:2], run.settings.templates)
    if members is not None:
        weights = {name: tensor for name, tensor in members.items() if name.startswith("weights.")}
        model.load_state_dict({name.removeprefix("weights."): tensor for name, tensor in weights.items()})
    return model.to(run.device)


def fitted(run: Run[Settings], data: DataSplits, net: nn.Module, epochs: int, lr: float) -> dict[str, Any]:
    """Train one network: its test accuracy, and validation accuracy by epoch."""
    curve: list[float] = []

    def keep(state: Any) -> None:
        if state.step % (-(-len(data.train) // run.settings.batch_size)) == 0:
            curve.append(accuracy(net, data.val))

    groups = param_groups(net.to(run.device), run.settings.weight_decay)
    optimizer = SGD(groups, lr=lr, momentum=run.settings.momentum, nesterov=True)
    task = replace(run.settings, epochs=epochs)
    scores = train(
        task, data, net, seed=run.seed, device=run.device, optimizer=optimizer, scheduler=one_cycle(lr), callbacks=[keep]
    )  # fmt: skip
    return {"accuracy": scores["accuracy"], "curve": curve}


def train_members(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """Train both members; their weights are what all growths start from."""
    model = growable(run, data)
    scores = [
        fitted(run, data, model.train_member(i), run.settings.epochs, run.settings.lr)["accuracy"] for i in (0, 1)
    ]
    weights = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
    return {
        "best": max(scores),
        "first": scores[0],
        "second": scores[1],
        "ensemble": accuracy(model, data.test),
        **weights,
    }


def grown(run: Run[Settings], data: DataSplits, members: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Grow the trained members in one way, and train the result."""
    model = growable(run, data, members)
    net: nn.Module = model
    epochs, example = run.settings.growth_epochs, data.train.tensors[0][:2].to(run.device)
    wide = wide_network(run.settings, data).to(run.device)
    if kind == "fresh":
        net = grow_by_tiling(wide, example, model.export(0), model.export(1), "random", seed=run.seed)
    elif kind == "net2net":  # it needs one member, and has the cost of the other for more training
        epochs += round(run.settings.epochs / 4)
        net = net2net_widen(wide, example, model.export(0), 0.1, seed=run.seed)
    else:
        model.grow("orthogonal" if kind == "permuted" else kind, seed=run.seed)  # pyright: ignore
        net = model
    if kind == "permuted":
        net = model.export()
        shuffle_added(model, net, run.seed)
    start = accuracy(net, data.test)
    return {"start": start, **fitted(run, data, net, epochs, run.settings.growth_lr)}


def shuffle_added(model: GrowableModel, net: nn.Module, seed: int) -> None:
    """The negative control: the entries of every added block in random order, so that only their sizes stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.net.named_modules():
        if isinstance(layer, TemplateLayer) and layer.blocks == 4:
            w0, w1, *added = (block.detach() for block in layer.mixtures())
            mixed = [w.flatten()[torch.randperm(w.numel(), generator=generator)].view_as(w) for w in added]
            net.get_submodule(name).weight.data.copy_(layer.join(w0, w1, *mixed))  # pyright: ignore


def exactness(run: Run[Settings], data: DataSplits, members: Mapping[str, Any]) -> dict[str, float]:
    """Zero growth against the sum of the members, and with fresh statistics."""
    model = growable(run, data, members).eval()
    x = data.test.tensors[0][:500].to(run.device)
    with torch.no_grad():
        members_sum = model(x)
        model.grow("zero")
        difference = float((model(x) - members_sum).abs().max())
        exported = float((model.export().eval()(x) - model(x)).abs().max())
    forgetful = copy.deepcopy(model)
    for module in forgetful.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return {"difference": difference, "exported": exported, "fresh_statistics": accuracy(forgetful, data.test)}


def costs(run: Run[Settings], data: DataSplits) -> dict[str, float]:
    """Operations of training in epochs of the wide network."""
    settings, x = run.settings, data.train.tensors[0][: run.settings.batch_size].to(run.device)
    model = growable(run, data)
    one = count_flops(wide_network(settings, data).to(run.device), x)
    member, full = model.flops(x, member=0) / one, model.flops(x) / one
    return {"member": member, "total": 2 * settings.epochs * member + settings.growth_epochs * full}


def run(run: Run[Settings]) -> None:
    """Train members, grow them in every way, and train the wide network from scratch at the same cost."""
    settings, data = run.settings, load(run)
    members = run.arm("members", train_members, run, data)
    kinds = ("orthogonal", "zero", "fresh", "permuted", *(("net2net",) if settings.net2net else ()))
    done = {kind: run.arm(kind, grown, run, data, members, kind) for kind in kinds}
    cost = run.arm("cost", costs, run, data)

    def from_scratch() -> dict[str, Any]:
        with seeded(run.seed):
            net = wide_network(settings, data)
        return fitted(run, data, net, max(1, round(cost["total"])), settings.lr)

    scratch = run.arm("scratch", from_scratch)["accuracy"]
    exact = run.arm("exact", exactness, run, data, members)
    after = {kind: arm["accuracy"] for kind, arm in done.items()}
    run.values("growth", pick(after, "orthogonal", "zero", "fresh"), best_member=members["best"])
    run.values(
        "equal_cost", orthogonal=after["orthogonal"], zero=after["zero"], scratch=scratch,
        cost_ratio=cost["total"] / (settings.epochs + settings.growth_epochs),
    )  # fmt: skip
    run.values("ensemble_start", difference=exact["difference"], exported=exact["exported"])
    run.values("control_permuted", permuted=after["permuted"], fresh=after["fresh"])
    run.values("control_batchnorm", fresh_statistics=exact["fresh_statistics"], ensemble=members["ensemble"])


def figures(results: Results) -> plots.Figures:
    """Accuracy of every network, and over the epochs after growth."""
    names = {"Orthogonal": "orthogonal", "Zero": "zero", "Fresh weights": "fresh", "Permuted": "permuted"}
    others = {"Net2Net": "net2net"} if results.settings.net2net else {}
    scores = {name: (arm, "accuracy") for name, arm in {**names, **others, "Scratch": "scratch"}.items()}
    return {
        "accuracy": plots.bars(
            results, {"Best member": ("members", "best"), "Ensemble": ("members", "ensemble"), **scores},
            ylabel="test accuracy (%)",
        ),
        "after growth": plots.curves(
            results, {name: (arm, "curve") for name, arm in names.items()}, xlabel="epoch after growth",
            ylabel="validation accuracy (%)",
        ),
    }  # fmt: skip
