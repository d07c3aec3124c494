"""Measures boundary tilting on digits 3 and 7: along regularisation paths, on purpose, by size of images, in networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeClassifier
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from torchfolio.experiments._image_pairs import ImagePair, image_pair, of_networks
from torchfolio.experiments._many_pixels import of_many_pixels
from torchfolio.robustness.boundary_tilting import (
    RidgePath,
    analyse,
    deviation_angle,
    plot_mirrors,
    plot_path,
    regularisation_path,
    tilt,
    tilt_direction,
)
from torchfolio.runs import Results, Run, plots, setting

Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """The two classes, and how far the paths go."""

    images: str = setting("mnist10k", "set of images")
    pair: tuple[int, ...] = setting((3, 7), "classes I and J")
    val: float = setting(0.25, "share of the training images that errors along the paths are measured on")
    alphas: tuple[float, ...] = setting(
        (6, -5), "exponents of 10 between which the ridge path runs, in variances of pixels in [0, 1]"
    )
    points: int = setting(50, "classifiers of the ridge path")
    costs: tuple[float, ...] = setting(
        (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), "regularisation C of the linear support vector machines"
    )
    angles: tuple[float, ...] = setting((0, 15, 30, 45, 60, 75, 85, 89, 89.9), "angles in degrees of the tilts")
    enlarged: tuple[int, ...] = setting((1, 2, 3), "factors by which images are enlarged")
    decays: tuple[float, ...] = setting((0.0, 1e-4, 1e-2), "weight decays of the network")
    epochs: int = setting(20, "its passes over the training images")


SCALES = {
    "smoke": Settings(images="digits", points=12, epochs=2, decays=(0.0, 1e-2)),
    "quick": Settings(),
    "full": Settings(images="cifar10", pair=(1, 9), points=200, enlarged=(1, 2), epochs=50),
}


def run(run: Run[Settings]) -> None:
    """Go along the paths, tilt the best classifier of the ridge path, then enlarge images and look at networks."""
    with threadpool_limits(1):
        data = image_pair(run)
        alphas = np.logspace(run.settings.alphas[0], run.settings.alphas[1], run.settings.points)
        path = RidgePath(data.X, data.y, alphas)
        ridge = run.arm("ridge", lambda: _columns(path.to_frame(data.X_val, data.y_val)))
        best = int(np.argmin(ridge["val_error"]))
        _claim_paths(run, ridge, best, run.arm("svm", _machines, run.settings, data))
        tilted = run.arm("tilt", _tilted, run.settings, data, path.coef_[best], path.intercept_[best])
        _claim_tilts(run, tilted)
        parts = data.X, data.y, data.X_test, data.shape
        grown = run.arm("dimension", of_many_pixels, *parts, alphas[best], run.settings.enlarged, run.seed)
        toy, angle = np.array(grown["toy_angles"]), np.array(grown["enlarged_angles"])
        changes = max(grown["changed_predictions"])
        run.values("dimension", spread=np.ptp(angle), changed=changes, toy_angle=toy.max())
        run.arm("network", of_networks, run, data)
        report = analyse(RidgeClassifier(alpha=len(data.X) * alphas[best]).fit(data.X, data.y), data.X, data.y)
        if data.shape[0] == 1:
            mirrors = plot_mirrors(report, (data.shape[1], data.shape[2]))
            run.figure("mirrors", mirrors, "ridge of least validation error")


def _columns(frame: Any) -> dict[str, list[float]]:
    return {name: frame[name].tolist() for name in frame}


def _machines(settings: Settings, data: ImagePair) -> dict[str, list[float]]:
    """Support vector machines by C, their intercept scaled up so that the penalty hardly holds it back."""
    frame = regularisation_path(
        lambda C: LinearSVC(C=C, loss="hinge", intercept_scaling=10, max_iter=20_000, random_state=0),
        settings.costs, data.X, data.y, data.X_val, data.y_val,
    )  # fmt: skip
    return _columns(frame)


def _claim_paths(run: Run[Settings], ridge: dict[str, Any], best: int, machines: dict[str, Any]) -> None:
    angle, error = np.array(ridge["angle"]), 100 * np.array(ridge["val_error"])
    ratio = ridge["strength"][-1] / ridge["strength"][best]
    run.values("ridge_path", first=angle[0], last=angle[-1], least_step=np.diff(angle).min(), ratio=ratio)
    ends = min(error[0], error[-1])
    run.values("error_path", gain=ends - error[best], best=error[best], types=len(set(ridge["type"])))
    angle, C = np.array(machines["angle"]), np.array(machines["regularisation"])
    at = int(np.argmin(abs(np.log(C / 0.1))))
    rank = float(spearmanr(C, angle).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    run.values("svm", smallest=angle[0], at_a_tenth=angle[at], rank=rank)


def _tilted(settings: Settings, data: ImagePair, w: Array, b: float) -> dict[str, Any]:
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


def figures(results: Results) -> plots.Figures:
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
