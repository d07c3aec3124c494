"""Measures Student-t processes of infinitely wide networks against their Gaussian twins: limits, outliers, corruption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchfolio.experiments._corrupted_digits import CORRUPTIONS, classify
from torchfolio.experiments._wide_networks import at_random_weights, last_layer_trained
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.theory.nngp_scale_mixture import NNGPKernel, StudentTProcessRegressor

PROCESSES: dict[str, dict[str, Any]] = {
    "t": {},
    "gp": {"prior": "fixed"},
    "gp_scaled": {"prior": "evidence"},
    "t_narrow": {"a": 1e4, "b": 1e4},
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the four comparisons."""

    draws: int = setting(2000, "networks at random weights")
    width: int = setting(1024, "their width")
    sizes: tuple[int, ...] = setting((5, 10, 20, 40, 100), "training points of the regressions")
    splits: int = setting(100, "random splits")
    outlier_share: float = setting(0.1, "probability of an outlier in the training targets")
    outlier: float = setting(5.0, "its size in standard deviations of the targets")
    digits: int = setting(1000, "training images")
    inducing: int = setting(100, "inducing points")
    depth: int = setting(3, "hidden layers of the classifiers' kernel")
    epochs: int = setting(200, "number of epochs of the classifiers")
    nets: int = setting(300, "networks whose last layer is trained")
    net_width: int = setting(512, "their width")
    net_points: int = setting(10, "their training points")


SCALES = {
    "smoke": Settings(draws=100, width=64, sizes=(5, 10, 20), splits=3, digits=100, inducing=20, epochs=2, nets=30),
    "quick": Settings(),
    "full": Settings(splits=400, digits=1400, inducing=200, epochs=300),
}


def run(run: Run[Settings]) -> None:
    """The limit of random networks, regression with and without outliers, classification, the trained last layer."""
    settings = run.settings
    run.values("student_t_limit", run.arm("random_networks", at_random_weights, settings.draws, settings.width))
    share = settings.outlier_share
    nll = {
        name: {key: np.asarray(v) for key, v in run.arm(name, _regression, run, *outliers).items()}
        for name, outliers in (("clean", (0.0, 0.0)), ("outliers", (share, share)), ("train_outliers", (share, 0.0)))
    }
    t, gp, scaled, narrow = (nll["outliers"][name] for name in PROCESSES)
    ten = settings.sizes.index(10)
    gain = np.minimum(gp, scaled) - t
    alone = nll["train_outliers"]
    run.values(
        "outliers",
        t_10=t[ten],
        gp_10=gp[ten],
        scaled_10=scaled[ten],
        worst_gain=gain.min(),
        gain_10=gain[ten],
        worst_gain_train_alone=(np.minimum(alone["gp"], alone["gp_scaled"]) - alone["t"]).min(),
    )
    loss = nll["clean"]["t"] - nll["clean"]["gp"]
    enough = np.asarray(settings.sizes) >= 20
    run.values("clean_regression", loss_5=loss[0], worst_loss_20_up=loss[enough].max())
    moved, with_outliers = (np.abs(nll[k]["t_narrow"] - nll[k]["gp"]) for k in ("clean", "outliers"))
    run.values(
        "negative_control",
        largest_difference=moved.max(),
        from_10_points=moved[ten:].max(),
        with_outliers=with_outliers.max(),
        lost_gain_10=narrow[ten] - t[ten],
    )
    ours, twin = (run.arm(name, classify, run, prior) for name, prior in (("svtp", (2.0, 2.0)), ("svgp", "fixed")))
    run.values("classification", {**ours, **{f"gp_{name}": value for name, value in twin.items()}})
    trained = settings.nets, settings.net_width, settings.net_points
    run.values("last_layer_training", run.arm("last_layer", last_layer_trained, *trained))


def _regression(run: Run[Settings], train_share: float, test_share: float) -> dict[str, list[float]]:
    """Mean negative log likelihood of 100 test targets, by process and number of training points.

    Training targets are standardised by themselves; the likelihood is given in standard deviations of the pool that they
    come from, in which outliers are measured, too.
    """
    settings = run.settings
    splits = run.data("diabetes", normalize=False, val=0, seed=0)
    parts = [part.tensors for part in (splits.train, splits.test)]
    X, y = (torch.cat([part[k] for part in parts]).double().numpy() for k in (0, 1))
    y = y.reshape(len(X))
    generator = np.random.default_rng(torch.initial_seed())  # the run's seed, equal for all arms
    totals = {name: np.zeros(len(settings.sizes)) for name in PROCESSES}
    for _ in run.progress(range(settings.splits), "splits"):
        order = generator.permutation(len(X))
        test, pool = order[:100], order[100:]
        inputs = (X - X[pool].mean(0)) / X[pool].std(0)
        targets = (y - y[pool].mean()) / y[pool].std()
        chance, signs = generator.random(len(X)), generator.choice([-1, 1], len(X))
        shares = np.full(len(X), train_share)
        shares[test] = test_share
        targets = targets + settings.outlier * signs * (chance < shares)
        for k, n in enumerate(settings.sizes):
            train = pool[:n]
            for name, process in PROCESSES.items():
                model = StudentTProcessRegressor(NNGPKernel(2), noise=0.3, optimize=False, **process).fit(
                    inputs[train], targets[train]
                )
                density = model.predict(inputs[test], return_dist=True).log_prob(torch.from_numpy(targets[test]))
                totals[name][k] -= float(density.mean())
    return {name: (total / settings.splits).tolist() for name, total in totals.items()}


def figures(results: Results) -> plots.Figures:
    """Negative log likelihood by the number of training points, clean and with outliers; accuracy under corruption."""
    labels = {"Student t": "t", "Gaussian": "gp", "Gaussian, fitted scale": "gp_scaled"}
    axes = {"xlabel": "training points", "ylabel": "negative log likelihood", "logx": True}
    drawn = {}
    for arm in ("clean", "outliers"):
        lines = {label: (arm, name) for label, name in labels.items()}
        drawn[f"regression, {arm}"] = plots.curves(results, lines, x=results.settings.sizes, **axes)
    scores = {f"{arm} {name}": (arm, f"{name}_nll") for name in CORRUPTIONS for arm in ("svtp", "svgp")}
    return {**drawn, "digits": plots.bars(results, scores, ylabel="negative log likelihood")}
