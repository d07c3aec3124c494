"""Information in the layers of small networks while they train, by adaptive and by fixed estimators."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.engine import fit_many
from torchfolio.experiments._binary_patterns import Net, hidden_weights, patterns
from torchfolio.experiments._information_pictures import compression_by_layer, planes_over_training
from torchfolio.insight.adaptive_mi import (
    AdaptiveBinning,
    AdaptiveKDE,
    FixedBinning,
    information_plane,
    log_spaced,
    permuted_label_information,
)
from torchfolio.runs import Results, Run, plots, setting


@dataclass(frozen=True)
class Settings:
    """Networks, their training and what is measured."""

    activations: tuple[str, ...] = setting(
        ("tanh", "relu", "elu"), "one ensemble each; `relu` has a second one with an L2 penalty"
    )
    widths: tuple[int, ...] = setting((10, 7, 5, 4, 3), "hidden layers")
    members: int = setting(5, "networks of an ensemble, which differ in their initial weights")
    epochs: int = setting(600, "number of epochs of training")
    batch_size: int = setting(256, "batch size of training")
    lr: float = setting(4e-4, "learning rate of Adam")
    penalty: float = setting(0.01, "weight of the squared weights of all layers but the last, halved")
    moments: int = setting(25, "measurements, spaced evenly in the logarithm of the epoch")
    bins: int = setting(30, "number of bins of the binned estimates")
    kde_rows: int = setting(1024, "inputs of the kernel estimate")
    train_share: float = setting(0.8, "share of the patterns that is trained on")


SCALES = {
    "smoke": Settings(activations=("tanh", "relu"), members=2, epochs=6, moments=4, kde_rows=128),
    "quick": Settings(),
    "full": Settings(
        activations=("tanh", "relu", "elu", "softplus", "swish", "prelu"), members=50, epochs=8000, moments=40,
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train an ensemble per activation and measure its layers along the way."""
    settings, last = run.settings, len(run.settings.widths) - 1
    ensembles = {name: run.arm(name, ensemble, run, name) for name in settings.activations}
    ensembles["relu_l2"] = run.arm("relu_l2", ensemble, run, "relu", settings.penalty)
    run.values("negative_control", run.arm("control", controls, run))
    compression = {name: np.asarray(arm["compression"]) for name, arm in ensembles.items()}  # [members, layers]
    mean = {name: float(values[:, 2 : last + 1].mean()) for name, values in compression.items()}
    regained = np.asarray(ensembles["tanh"]["regained"])[:, last].mean()
    tanh = compression["tanh"][:, last].mean()
    run.values("tanh_compresses", compression=tanh, regained_label_information=regained)
    unbounded = [compression[name] for name in ("relu", "elu") if name in compression]
    largest = max(values[:, : last + 1].mean(0).max() for values in unbounded)
    means = [mean[name] for name in settings.activations]
    run.values("no_saturation_needed", largest=largest, spread=max(means) - min(means))
    deviation = max(compression[n][:, last - 1 : last + 1].std(0, ddof=1).max() for n in ("tanh", "relu"))
    run.values("varies_with_initialisation", deviation=deviation)
    accuracy, without = (100 * float(np.mean(ensembles[name]["accuracy"])) for name in ("relu_l2", "relu"))
    bits = {"with_penalty": mean["relu_l2"], "without": mean["relu"]}
    run.values("l2_compresses", bits, accuracy=accuracy, accuracy_without=without)


def ensemble(run: Run[Settings], activation: str, penalty: float = 0.0) -> dict[str, Any]:
    """Networks of one activation: information of every layer over training, compression, accuracy."""
    settings = run.settings
    x, y, trained = patterns(run)
    nets = [Net(settings.widths, activation) for _ in range(settings.members)]
    per_epoch = -(-int(trained.sum()) // settings.batch_size)
    when = {epoch * per_epoch: epoch for epoch in log_spaced(settings.moments, settings.epochs)}
    probe = copy.deepcopy(nets[0]).eval()
    names = [name for name, _ in probe.named_children()][:-1]
    estimators = (AdaptiveBinning(settings.bins), len(x)), (AdaptiveKDE(), settings.kde_rows)
    planes: list[Any] = []

    def look(step: int, stacked: dict[str, Tensor]) -> None:
        if step not in when:
            return
        for k in range(settings.members):
            with torch.no_grad():
                for name, p in probe.named_parameters():
                    p.copy_(stacked[name][k])
            for estimator, rows in estimators:
                plane = information_plane(probe, names, x[:rows], y[:rows], estimator, output=True)
                planes.append([plane.i_xt, plane.i_ty])

    fit_many(
        nets, x[trained], y[trained], steps=settings.epochs * per_epoch, lr=settings.lr, optimizer="adam",
        batch_size=settings.batch_size, penalty=hidden_weights(penalty) if penalty else None, record=look,
        seed=[run.seed + k for k in range(settings.members)],
    )  # fmt: skip
    table = np.array(planes).reshape(-1, settings.members, 2, 2, len(names) + 1)  # [moments, members, estimators, …]
    (i_xt, i_ty), (kernel_i_xt, kernel_i_ty) = table.transpose(2, 3, 0, 1, 4)
    with torch.no_grad():
        accuracy = [float((net.eval()(x[~trained]).argmax(1) == y[~trained]).double().mean()) for net in nets]
    return {
        "epochs": list(when.values()), "i_xt": i_xt, "i_ty": i_ty, "kernel_i_xt": kernel_i_xt,
        "kernel_i_ty": kernel_i_ty, "compression": i_xt.max(0) - i_xt[-1], "regained": i_ty[-1] - i_ty.min(0),
        "accuracy": accuracy,
    }  # fmt: skip


def controls(run: Run[Settings]) -> dict[str, float]:
    """What a fixed range mistakes for information, and what shuffled labels seem to carry, in an untrained network.

    Every hidden layer is multiplied by 10 as it is: neither a layer nor a scale is picked. The change of fixed bins
    is the mean over layers, the others are the largest over layers.
    """
    x, y, _ = patterns(run)
    # In double precision the factor keeps neighbouring values apart, as a strictly increasing map does.
    net = Net(run.settings.widths, "relu").double().eval()
    shuffled = y[torch.randperm(len(y), generator=run.generator())]
    fixed, adaptive = FixedBinning(run.settings.bins, 0, 1), AdaptiveBinning(run.settings.bins)
    changes, moved, excess = [], [], []
    t = x.double()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for layer in list(net.children())[:-1]:
            t = layer(t)
            changes.append(abs(fixed(10 * t).i_xt - fixed(t).i_xt))
            moved.append(abs(adaptive(10 * t).i_xt - adaptive(t).i_xt))
            expected, _ = permuted_label_information(adaptive, t, y, seed=run.seed + 1)
            excess.append(adaptive(t, shuffled).i_ty - expected)
    return {
        "fixed_change": float(np.mean(changes)), "adaptive_change": max(moved), "shuffled_excess": max(excess, key=abs),
    }  # fmt: skip


def figures(results: Results) -> plots.Figures:
    """Information planes, and compression by layer and activation."""
    return {"information plane": planes_over_training(results), "compression": compression_by_layer(results)}
