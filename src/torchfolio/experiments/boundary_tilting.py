"""Measures boundary tilting on digits 3 and 7: along regularisation paths, on purpose, by size of images, in networks.

Longer than most, as the paper argues by five small measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeClassifier
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits
from torch.utils.data import TensorDataset

from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import sgd
from torchfolio.models import MLP
from torchfolio.robustness.boundary_tilting import (
    RidgePath,
    TiltReport,
    analyse,
    deviation_angle,
    plot_mirrors,
    plot_path,
    regularisation_path,
    tilt,
    tilt_direction,
)
from torchfolio.runs import Results, Run, plots

Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """The two classes, and how far the paths go.

    Attributes:
        images: set of images.
        pair: classes I and J.
        val: share of the training images that errors along the paths are measured on.
        alphas: exponents of 10 between which the ridge path runs, in variances of pixels in [0, 1].
        points: classifiers of the ridge path.
        costs: C of the linear support vector machines.
        angles: angles in degrees of the tilts.
        enlarged: factors by which images are enlarged.
        decays: weight decays of the network.
        epochs: its passes over the training images.
    """

    images: str = "mnist10k"
    pair: tuple[int, ...] = (3, 7)
    val: float = 0.25
    alphas: tuple[float, ...] = (6, -5)
    points: int = 50
    costs: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    angles: tuple[float, ...] = (0, 15, 30, 45, 60, 75, 85, 89, 89.9)
    enlarged: tuple[int, ...] = (1, 2, 3)
    decays: tuple[float, ...] = (0.0, 1e-4, 1e-2)
    epochs: int = 20


SCALES = {
    "smoke": Settings(images="digits", points=12, epochs=2, decays=(0.0, 1e-2)),
    "quick": Settings(),
    "full": Settings(images="cifar10", pair=(1, 9), points=200, enlarged=(1, 2), epochs=50),
}


@dataclass(frozen=True)
class _Data:
    """Images `[N, d]` in [0, 1] and labels of the two classes: to fit, to choose by, to report on."""

    X: Array
    y: Array
    X_val: Array
    y_val: Array
    X_test: Array
    y_test: Array
    shape: tuple[int, ...]


def run(run: Run[Settings]) -> None:
    """Go along the paths, tilt the best classifier of the ridge path, then enlarge images and look at networks."""
    with threadpool_limits(1):
        data = _load(run)
        alphas = np.logspace(run.settings.alphas[0], run.settings.alphas[1], run.settings.points)
        path = RidgePath(data.X, data.y, alphas)
        ridge = run.arm("ridge", lambda: _columns(path.to_frame(data.X_val, data.y_val)))
        best = int(np.argmin(ridge["val_error"]))
        _claim_paths(run, ridge, best, run.arm("svm", _machines, run.settings, data))
        tilted = run.arm("tilt", _tilted, run.settings, data, path.coef_[best], path.intercept_[best])
        _claim_tilts(run, tilted)
        grown = run.arm("dimension", _dimension, run, data, alphas[best])
        toy, angle = np.array(grown["toy_angles"]), np.array(grown["enlarged_angles"])
        changes = max(grown["changed_predictions"])
        run.values("dimension", spread=np.ptp(angle), changed=changes, toy_angle=toy.max())
        run.arm("network", _networks, run, data)
        report = analyse(RidgeClassifier(alpha=len(data.X) * alphas[best]).fit(data.X, data.y), data.X, data.y)
        if data.shape[0] == 1:
            run.figure(
                "mirrors", plot_mirrors(report, (data.shape[1], data.shape[2])), "ridge of least validation error"
            )


def _load(run: Run[Settings]) -> _Data:
    """The two classes; the seed draws which training images are held out."""
    data = run.data(run.settings.images, val=0, normalize=False)
    (X, y), (X_test, y_test) = (
        (x.flatten(1).double().numpy()[np.isin(t, run.settings.pair)], t.numpy()[np.isin(t, run.settings.pair)])
        for x, t in (data.train.tensors, data.test.tensors)
    )
    order = np.random.default_rng(run.seed).permutation(len(X))
    held, used = np.split(order, [round(run.settings.val * len(X))])
    return _Data(X[used], y[used], X[held], y[held], X_test, y_test, data.shape)


def _columns(frame: Any) -> dict[str, list[float]]:
    return {name: frame[name].tolist() for name in frame}


def _machines(settings: Settings, data: _Data) -> dict[str, list[float]]:
    """Support vector machines by C, their intercept scaled up so that the penalty hardly holds it back."""
    frame = regularisation_path(
        lambda C: LinearSVC(C=C, loss="hinge", intercept_scaling=10, max_iter=20_000, random_state=0),
        settings.costs, data.X, data.y, data.X_val, data.y_val,
    )  # fmt: skip
    return _columns(frame)


def _claim_paths(run: Run[Settings], ridge: dict[str, Any], best: int, machines: dict[str, Any]) -> None:
    angle, error = np.array(ridge["angle"]), 100 * np.array(ridge["val_error"])
    run.values(
        "ridge_path",
        first=angle[0], last=angle[-1], least_step=np.diff(angle).min(),
        ratio=ridge["strength"][-1] / ridge["strength"][best],
    )  # fmt: skip
    ends = min(error[0], error[-1])
    run.values("error_path", gain=ends - error[best], best=error[best], types=len(set(ridge["type"])))
    angle, C = np.array(machines["angle"]), np.array(machines["regularisation"])
    at = int(np.argmin(abs(np.log(C / 0.1))))
    rank = float(spearmanr(C, angle).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    run.values("svm", smallest=angle[0], at_a_tenth=angle[at], rank=rank)


def _tilted(settings: Settings, data: _Data, w: Array, b: float) -> dict[str, Any]:
    """Tilt a classifier to and fro: where the training images do not vary, and where they vary the most."""
    mean = data.X.mean(0)
    _, size, rows = np.linalg.svd(data.X - mean, full_matrices=False)
    span = rows[size > 1e-8 * size[0]]
    projected = mean + (data.X_test - mean) @ span.T @ span
    free, leading = (tilt_direction(w, data.X, data.y, along) for along in ("trailing", "leading"))
    kept, upper = projected @ w + b > 0, data.y_test == data.y_test.max()
    out: dict[str, list[float]] = {key: [] for key in ("changed", "strength", "off_span", "free_error", "error")}
    for angle in settings.angles:
        c, offset = tilt(w, b, free, angle, mean)
        out["changed"].append(float(((projected @ c + offset > 0) != kept).sum()))
        out["off_span"].append(float(((data.X_test @ c + offset > 0) != (data.X_test @ w + b > 0)).sum()))
        out["free_error"].append(100 * float(((data.X_test @ c + offset > 0) != upper).mean()))
        out["strength"].append(1 / float(np.cos(np.radians(deviation_angle(c, data.X, data.y)))))
        c, offset = tilt(w, b, leading, angle, mean)
        out["error"].append(100 * float(((data.X_test @ c + offset > 0) != upper).mean()))
    return {"angles": list(settings.angles), **out}


def _claim_tilts(run: Run[Settings], tilted: dict[str, Any]) -> None:
    at = list(tilted["angles"]).index(89)
    growth = tilted["strength"][at] / tilted["strength"][0]
    run.values("free_tilting", changed=tilted["changed"][at], growth=growth, off_span=tilted["off_span"][at])
    run.values("negative_control", error=tilted["error"][at], untilted=tilted["error"][0])


def _dimension(run: Run[Settings], data: _Data, alpha: float) -> dict[str, Any]:
    """Enlarged images, whose ridge grows with their size; and a half-plane under noise, in more and more pixels."""
    angles, changed, first = [], [], None
    keep = slice(0, 300)  # enlarged images are many numbers
    for k in run.settings.enlarged:
        large, test = (_enlarged(part, data.shape, k) for part in (data.X[keep], data.X_test[keep]))
        path = RidgePath(large, data.y[keep], [k**2 * alpha])
        prediction = test @ path.coef_[0] + path.intercept_[0] > 0
        first = prediction if first is None else first
        angles.append(float(path.angles[0]))
        changed.append(int((prediction != first).sum()))
    sides, toy = (10, 20, 30), []
    for side in sides:
        rng = np.random.default_rng(run.seed)
        y = np.arange(10 * side**2) % 2
        pattern = np.repeat(np.where(np.arange(side) < side // 2, 1.0, -1.0)[None], side, 0).ravel()
        X = (2.0 * y - 1)[:, None] * pattern + 0.5 * rng.standard_normal((len(y), side**2))
        toy.append(float(RidgePath(X, y, [1.0]).angles[0]))
    return {"sides": list(sides), "enlarged_angles": angles, "changed_predictions": changed, "toy_angles": toy}


def _enlarged(X: Array, shape: tuple[int, ...], k: int) -> Array:
    return X.reshape(-1, *shape).repeat(k, -1).repeat(k, -2).reshape(len(X), -1)


def _networks(run: Run[Settings], data: _Data) -> dict[str, Any]:
    """A network by weight decay: median angle and strength at the validation images, and test accuracy."""
    out: dict[str, list[float]] = {"decays": [], "angle": [], "strength": [], "accuracy": []}
    parts = [
        TensorDataset(torch.from_numpy(X).float(), torch.from_numpy((y == y.max()).astype(np.int64)))
        for X, y in ((data.X, data.y), (data.X_val, data.y_val), (data.X_test, data.y_test))
    ]
    for decay in run.settings.decays:
        torch.manual_seed(run.seed)
        net = MLP(data.X.shape[1], 2, (100,))
        fit(
            net,
            parts[0],
            optimizer=sgd(lr=0.05, weight_decay=decay),
            epochs=run.settings.epochs,
            device=run.device,
            seed=run.seed,
        )
        report: TiltReport = analyse(net, *parts[1].tensors, classes=(0, 1))
        accuracy = 100 * evaluate(net, parts[2], device=run.device)["accuracy"]
        for key, value in zip(out, (decay, report.angle, report.strength, accuracy), strict=True):
            out[key].append(value)
    return out


def figures(results: Results) -> dict[str, Figure]:
    """Both paths of the first seed, and the tilts over seeds."""
    import pandas as pd

    names = ("regularisation", "angle", "strength", "train_error", "val_error", "type")
    drawn = {
        f"{arm} path": plot_path(pd.DataFrame({name: results.values(arm, name)[0] for name in names}))
        for arm in ("ridge", "svm")
    }
    lines = {"without data": ("tilt", "free_error"), "where data vary most": ("tilt", "error")}
    angles = results.values("tilt", "angles")[0]
    drawn["tilts"] = plots.curves(results, lines, x=angles, xlabel="tilt (degrees)", ylabel="test error (%)")
    return drawn


def peers(bench: Any) -> None:
    """A path of 50 beside a loop of scikit-learn's ridge classifiers."""
    from torchfolio.data import load

    x, y = load("mnist10k", val=0, normalize=False).train.tensors
    pair = (y == 3) | (y == 7)
    X, labels = x[pair].flatten(1).double().numpy(), y[pair].numpy()
    alphas = np.logspace(6, -5, 50)
    bench.compare(
        "path of 50, MNIST 3 and 7, 1,706 x 784",
        repeats=3,
        ours=lambda: RidgePath(X, labels, alphas),
        ridge_classifier=lambda: [RidgeClassifier(alpha=len(X) * a).fit(X, labels) for a in alphas],
    )
