"""Measures growth by mixtures of learned templates beside other starts of the added weights, on a wide residual net."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchfolio.efficiency.mixture_growth import grow_by_tiling, net2net_widen
from torchfolio.engine import seeded
from torchfolio.experiments._template_networks import TemplateNetworks, shuffle_added
from torchfolio.measure import count_flops
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.runs.tasks import SMOKE, Task, accuracy


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


class Growth(TemplateNetworks):
    """The arms of one seed; all growths start from the same two members."""

    def members(self) -> dict[str, Any]:
        """Train both members; scores, and their weights."""
        s, model = self.settings, self.growable()
        first, second = (self.fitted(model.train_member(i), s.epochs, s.lr)["accuracy"] for i in (0, 1))
        scores = {"best": max(first, second), "first": first, "second": second}
        weights = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
        return {**scores, "ensemble": accuracy(model, self.data.test), **weights}

    def grown(self, members: Mapping[str, Any], kind: str) -> dict[str, Any]:
        """Grow the trained members in one way, and train the result."""
        s, seed, model = self.settings, self.run.seed, self.growable(members)
        net: nn.Module = model
        epochs, example = s.growth_epochs, self.example.to(self.run.device)
        wide = self.wide().to(self.run.device)
        if kind == "fresh":
            net = grow_by_tiling(wide, example, model.export(0), model.export(1), "random", seed=seed)
        elif kind == "net2net":  # it needs one member, and has the cost of the other for more training
            epochs += round(s.epochs / 4)
            net = net2net_widen(wide, example, model.export(0), 0.1, seed=seed)
        else:
            model.grow("orthogonal" if kind == "permuted" else kind, seed=seed)  # pyright: ignore
        if kind == "permuted":
            net = model.export()
            shuffle_added(model, net, seed)
        return {"start": accuracy(net, self.data.test), **self.fitted(net, epochs, s.growth_lr)}

    def exactness(self, members: Mapping[str, Any]) -> dict[str, float]:
        """Zero growth against the sum of the members, and with fresh statistics."""
        model, x = self.growable(members).eval(), self.data.test.tensors[0][:500].to(self.run.device)
        with torch.no_grad():
            members_sum = model(x)
            model.grow("zero")
            difference = float((model(x) - members_sum).abs().max())
            exported = float((model.export().eval()(x) - model(x)).abs().max())
        forgetful = copy.deepcopy(model)
        for module in forgetful.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        return {"difference": difference, "exported": exported, "fresh_statistics": accuracy(forgetful, self.data.test)}

    def costs(self) -> dict[str, float]:
        """Operations of training in epochs of the wide network."""
        s, model = self.settings, self.growable()
        x = self.data.train.tensors[0][: s.batch_size].to(self.run.device)
        one = count_flops(self.wide().to(self.run.device), x)
        member, full = model.flops(x, member=0) / one, model.flops(x) / one
        return {"member": member, "total": 2 * s.epochs * member + s.growth_epochs * full}

    def scratch(self, epochs: int) -> dict[str, Any]:
        """The wide network, trained from the start."""
        with seeded(self.run.seed):
            net = self.wide()
        return self.fitted(net, epochs, self.settings.lr)


def run(run: Run[Settings]) -> None:
    """Train members, grow them in every way, and train the wide network from scratch at the same cost."""
    s, growth = run.settings, Growth(run)
    members = run.arm("members", growth.members)
    kinds = ("orthogonal", "zero", "fresh", "permuted", *(("net2net",) if s.net2net else ()))
    after = {kind: run.arm(kind, growth.grown, members, kind)["accuracy"] for kind in kinds}
    cost = run.arm("cost", growth.costs)["total"]
    scratch = run.arm("scratch", growth.scratch, max(1, round(cost)))["accuracy"]
    exact = run.arm("exact", growth.exactness, members)
    run.values("growth", pick(after, "orthogonal", "zero", "fresh"), best_member=members["best"])
    ratio = cost / (s.epochs + s.growth_epochs)
    run.values("equal_cost", pick(after, "orthogonal", "zero"), scratch=scratch, cost_ratio=ratio)
    run.values("ensemble_start", pick(exact, "difference", "exported"))
    run.values("control_permuted", pick(after, "permuted", "fresh"))
    run.values("control_batchnorm", fresh_statistics=exact["fresh_statistics"], ensemble=members["ensemble"])


def figures(results: Results) -> plots.Figures:
    """Accuracy of every network, and over the epochs after growth."""
    names = {"Orthogonal": "orthogonal", "Zero": "zero", "Fresh weights": "fresh", "Permuted": "permuted"}
    others = {"Net2Net": "net2net"} if results.settings.net2net else {}
    scores = {"Best member": ("members", "best"), "Ensemble": ("members", "ensemble")}
    scores |= {name: (arm, "accuracy") for name, arm in {**names, **others, "Scratch": "scratch"}.items()}
    courses = {name: (arm, "curve") for name, arm in names.items()}
    label = "validation accuracy (%)"
    return {
        "accuracy": plots.bars(results, scores, ylabel="test accuracy (%)"),
        "after growth": plots.curves(results, courses, xlabel="epoch after growth", ylabel=label),
    }
