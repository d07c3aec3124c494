"""Measures adaptive heads beside NT-Xent on digits, with one kind of augmentation and with five."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.data import DataSplits
from torchfolio.engine.recipes import adam
from torchfolio.experiments._digit_views import Views
from torchfolio.measure import outputs
from torchfolio.measure.probes import knn_accuracy, linear_probe
from torchfolio.measure.scores import auroc
from torchfolio.models.conv_net import conv_block
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.training.amcl import AMCL, FixedTemperature, PairTemperature


@dataclass(frozen=True)
class Settings:
    """Pretraining on digits without labels."""

    epochs: int = setting(30, "passes over the training images")
    batch_size: int = setting(200, "images of a step, two views each")
    lr: float = setting(2e-3, "learning rate of Adam")
    out_dim: int = setting(32, "width of projections")
    fixed: tuple[float, ...] = setting((0.1, 0.2, 0.3, 0.5), "temperatures that NT-Xent may choose from")
    adaptive: tuple[tuple[float, float], ...] = setting(
        ((0.5, 1e-3), (0.5, 1e-2), (1.0, 1e-3), (1.0, 1e-2)),
        "(upper bound, weight of the penalty) that adaptive heads may choose from; as many",
    )
    kinds: tuple[int, int] = setting((1, 5), "numbers of kinds of augmentation")
    test_size: int | None = setting(None, "test images")


SCALES = {
    "smoke": Settings(epochs=1, fixed=(0.3,), adaptive=((0.5, 1e-3),)),
    "quick": Settings(),
    "full": Settings(epochs=100),
}


def encoder() -> nn.Module:
    """Three convolutions to 48 features."""
    return nn.Sequential(
        conv_block(1, 12), conv_block(12, 24, 2), conv_block(24, 24, 2), nn.Flatten(), nn.Linear(96, 48),
        nn.BatchNorm1d(48), nn.ReLU(),
    )  # fmt: skip


def pretrain(run: Run[Settings], data: DataSplits, kinds: int, heads: int, setting: Any, **form: Any) -> dict[str, Any]:
    """Accuracies in percent of probes on frozen features, on validation and on test images; AUROC of pairs."""
    s = run.settings
    torch.manual_seed(run.seed)
    net, views = encoder(), Views(kinds)
    if isinstance(setting, tuple):
        temperature, beta = PairTemperature(s.out_dim, high=setting[0]), setting[1]
    else:
        temperature, beta = FixedTemperature(setting), 0.0
    rule = AMCL(views, heads, s.out_dim, temperature, beta, **form)
    run.fit(net, data.train, rule=rule, optimizer=adam(s.lr), epochs=s.epochs, batch_size=s.batch_size, drop_last=True)
    (_, y), (_, y_val), (x_test, y_test) = data.train.tensors, data.val.tensors, data.test.tensors
    h, h_val, h_test = (outputs(net, part) for part in (data.train, data.val, data.test))
    ten = torch.cat([(y == k).nonzero().flatten()[:10] for k in range(data.num_classes)])
    parts: Any = rule.parts
    generator = run.generator()
    with torch.no_grad():
        z = [F.normalize(parts["projector"](outputs(net, (views(x_test, generator), y_test))), dim=-1) for _ in "ab"]
        similarity = torch.einsum("cid,cjd->ij", *z).flatten() / heads
    return {
        "val": 100 * linear_probe(h, y, h_val, y_val, max_iter=1000),
        "all": 100 * linear_probe(h, y, h_test, y_test, max_iter=1000),
        "ten": 100 * linear_probe(h[ten], y[ten], h_test, y_test, max_iter=1000),
        "knn": 100 * knn_accuracy(h, y, h_test, y_test, k=20),
        "auroc": auroc(similarity, torch.eye(len(x_test), dtype=torch.int64).flatten()),
    }


def run(run: Run[Settings]) -> None:
    """Every setting of either side on validation images; test images for the chosen one alone."""
    s, data = run.settings, run.data("digits", test_size=run.settings.test_size, val=240, normalize=False)
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for kinds in s.kinds:
        sides = {"ntxent": (1, s.fixed), "amcl": (3, s.adaptive)}
        if kinds > 1:
            sides |= {"ntxent_3": (3, s.fixed), "one_head": (1, s.adaptive)}
        for side, (heads, settings) in sides.items():
            chosen = _chosen(best, side, kinds, settings)
            arms = [run.arm(f"{side}_{kinds}_{k}", pretrain, run, data, kinds, heads, settings[k]) for k in chosen]
            k = max(range(len(arms)), key=lambda k, arms=arms: arms[k]["val"])
            best[side, kinds] = {**arms[k], "choice": chosen[k]}
    run.arm("max_5_0", pretrain, run, data, 5, 3, s.adaptive[0], negatives="max")
    nt, amcl, one = (best[side, s.kinds[1]] for side in ("ntxent", "amcl", "one_head"))
    nt_1, amcl_1 = (best[side, s.kinds[0]] for side in ("ntxent", "amcl"))
    run.values(
        "beats_ntxent", amcl=amcl["all"], ntxent=nt["all"], amcl_ten=amcl["ten"], ntxent_ten=nt["ten"],
        amcl_knn=amcl["knn"], ntxent_knn=nt["knn"], ntxent_3=best["ntxent_3", s.kinds[1]]["all"],
    )  # fmt: skip
    run.values("one_head_control", one_head=one["all"], ntxent=nt["all"])
    run.values(
        "grows_with_augmentation", gain_of_five=amcl["all"] - nt["all"], gain_of_one=amcl_1["all"] - nt_1["all"],
        gain_of_five_ten=amcl["ten"] - nt["ten"], gain_of_one_ten=amcl_1["ten"] - nt_1["ten"],
    )  # fmt: skip
    run.values("separation", amcl=amcl["auroc"], ntxent=nt["auroc"])


def _chosen(best: dict[tuple[str, int], dict[str, Any]], side: str, kinds: int, settings: Any) -> list[int]:
    """Settings to try: all; for the side arms the one that their like chose."""
    like = {"ntxent_3": "ntxent", "one_head": "amcl"}.get(side)
    return list(range(len(settings))) if like is None else [best[like, kinds]["choice"]]


def figures(results: Results) -> plots.Figures:
    """Linear probes of every setting, with five kinds of augmentation and with one."""
    s: Settings = results.settings
    made = {}
    for kinds in s.kinds:
        arms = {f"NT-Xent {t}": (f"ntxent_{kinds}_{k}", "all") for k, t in enumerate(s.fixed)}
        arms |= {f"AMCL {u}, {b}": (f"amcl_{kinds}_{k}", "all") for k, (u, b) in enumerate(s.adaptive)}
        made[f"{kinds} kinds of augmentation"] = plots.bars(results, arms, ylabel="linear probe (%)")
    return made
