"""Measures limits of wide and deep networks on the sphere against the Bayes rule, the nearest neighbour, each other."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from torchfolio.experiments._dirichlet_spheres import draw
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.theory.infinite_classifiers import (
    DualActivation,
    HermiteActivation,
    InfiniteNetworkClassifier,
    OptimalActivation,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = tuple[np.ndarray, np.ndarray]
DEEP_DIM = 4  # of the data for finite depths: on the circle hundreds of points are nearer than 14 layers resolve
SECOND = HermiteActivation([0, 0, 1])
FLAT = DualActivation([0, 0.9**0.5, *[0.0] * 9, 0.1**0.5])  # dual .9 ξ + .1 ξ¹¹, exponent 0.304
CUBIC = DualActivation([0.2**0.5, 0, 0, 0.8**0.5])  # dual .2 + .8 ξ³


@dataclass(frozen=True)
class Settings:
    """Sizes of the data."""

    dims: tuple[int, ...] = setting((1, 2), "dimensions of the spheres, 1 first")
    sizes: tuple[int, ...] = setting((200, 1000, 2000), "training points, smallest first")
    test_size: int = setting(2000, "test points")
    vote_size: int = setting(101, "training points of the majority votes, odd")
    vote_test_size: int = setting(500, "their test points")
    relu_depths: tuple[int, ...] = setting((10, 100, 1000, 5000), "depths of the ReLU network")
    images: str | None = setting(None, "image set whose digits are told odd from even, or `None`")
    image_sizes: tuple[int, int] = setting((8000, 2000), "training and test images")


SCALES = {
    "smoke": Settings(dims=(1,), sizes=(50, 200), test_size=200, vote_test_size=50, relu_depths=(10, 100)),
    "quick": Settings(),
    "full": Settings(dims=(1, 2, 4, 8), sizes=(200, 2000, 10_000), test_size=10_000, images="mnist10k"),
}


def run(run: Run[Settings]) -> None:
    """Accuracies on each sphere, then the votes and the two clusters on the circle."""
    settings = run.settings
    arms = {d: run.arm(f"sphere_{d}", _sphere, settings, d) for d in settings.dims}
    circle = {name: np.asarray(values) for name, values in arms[settings.dims[0]].items()}
    gap = circle["bayes"] - circle["optimal"]
    bayes, optimal, nearest = (float(circle[name][-1]) for name in ("bayes", "optimal", "nearest"))
    run.values("optimality", bayes=bayes, optimal=optimal, nearest=nearest, first_gap=gap[0], last_gap=gap[-1])
    run.values("hilbert", agreement=circle["hilbert_agreement"][-1])
    run.values("control_large_exponent", optimal=optimal, exponent_2=circle["exponent_2"][-1])
    run.values("nearest_neighbor", run.arm("nearest", _nearest, settings))
    votes = run.arm("votes", _votes, settings)
    run.values(
        "majority_vote", cubic=min(votes["cubic"]), relu=votes["relu"][-1], on_circle=votes["cubic_on_circle"][-1]
    )
    run.values("control_small_exponent", run.arm("clusters", _clusters, settings))
    if settings.images:
        run.arm("images", _images, run)


def _sphere(settings: Settings, dim: int) -> dict[str, Any]:
    generator = np.random.default_rng(torch.initial_seed())
    X_test, y_test, bayes = draw(dim, settings.test_size, generator)
    X, y, _ = draw(dim, settings.sizes[-1], generator)
    activations = {"optimal": "optimal", "sine": "sine", "erf": "erf", "nearest": SECOND, "relu": "relu"}
    if dim == 1:
        activations["exponent_2"] = OptimalActivation(2)
    scores: dict[str, list[float]] = {name: [] for name in [*activations, "hilbert", "hilbert_agreement", "bayes"]}
    for n in settings.sizes:
        said = {name: predict(phi, X[:n], y[:n], X_test) for name, phi in activations.items()}
        # Devroye's Hilbert kernel: votes by the distance to the power -dim.
        squares = np.maximum(2 - 2 * X_test @ X[:n].T, 1e-300)
        said["hilbert"] = (squares ** (-dim / 2) @ (2 * y[:n] - 1) > 0).astype(int)
        said["bayes"] = bayes
        for name, labels in said.items():
            scores[name].append(float((labels == y_test).mean()))
        scores["hilbert_agreement"].append(float((said["optimal"] == said["hilbert"]).mean()))
    return scores


def predict(activation: Any, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, **settings: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the majority vote is tied")
        return InfiniteNetworkClassifier(activation, **settings).fit(X, y).predict(X_test)


def _nearest(settings: Settings) -> dict[str, float]:
    """Agreement with the nearest neighbour; on the sphere whose points a network of depth 14 can tell apart."""
    generator = np.random.default_rng(torch.initial_seed())
    (X, y, _), (X_test, _, _) = (draw(DEEP_DIM, n, generator) for n in (settings.sizes[-1], settings.test_size))
    nearest = KNeighborsClassifier(1).fit(X, y).predict(X_test)
    said = {"depth_14": predict(SECOND, X, y, X_test, depth=14), "infinite": predict(SECOND, X, y, X_test)}
    return {name: float((labels == nearest).mean()) for name, labels in said.items()}


def _votes(settings: Settings) -> dict[str, list[float]]:
    """Share of test points that get the majority's label, by depth."""
    generator = np.random.default_rng(torch.initial_seed())
    shares = {}
    for name, dim, phi, depths in (
        ("cubic", DEEP_DIM, CUBIC, (20, 30, 40)),
        ("cubic_on_circle", 1, CUBIC, (20, 30, 40)),
        ("relu", DEEP_DIM, "relu", settings.relu_depths),
    ):
        (X, y, _), (X_test, _, _) = (draw(dim, n, generator) for n in (settings.vote_size, settings.vote_test_size))
        majority = int(2 * y.sum() > len(y))
        said = [predict(phi, X, y, X_test, depth=depth) for depth in depths]
        shares[name] = [float((labels == majority).mean()) for labels in said]
    return shares


def _clusters(settings: Settings) -> dict[str, float]:
    """Agreement with the Bayes rule in the small one of two clusters, whose points are mostly negative."""
    generator = np.random.default_rng(torch.initial_seed())
    n = settings.sizes[-1]
    large = generator.random(n) < 0.9
    angle = np.where(large, generator.uniform(0, 0.6, n), generator.uniform(1.2, 1.5, n))
    y = (generator.random(n) < np.where(large, 0.9, 0.3)).astype(int)
    inside = generator.uniform(1.2, 1.5, settings.test_size // 2)
    X, X_test = (np.stack([np.cos(a), np.sin(a)], 1) for a in (angle, inside))
    cases = {"optimal": OptimalActivation(1), "exponent_2": OptimalActivation(2), "small_exponent": FLAT}
    return {name: float((predict(phi, X, y, X_test) == 0).mean()) for name, phi in cases.items()}


def _images(run: Run[Settings]) -> dict[str, float]:
    """Odd digits from even ones: accuracies of the infinite network and of the nearest neighbour, and the dimension."""
    train_size, test_size = run.settings.image_sizes
    splits = run.data(str(run.settings.images), train_size=train_size, test_size=test_size, normalize=False)
    (X, y), (X_test, y_test) = (
        (part.tensors[0].flatten(1).double().numpy(), part.tensors[1].numpy() % 2)
        for part in (splits.train, splits.test)
    )
    model = InfiniteNetworkClassifier(intrinsic_dim="estimate").fit(X, y)
    scores = {"optimal": model.score(X_test, y_test), "dimension": float(model.intrinsic_dim_ or 0)}
    return {**scores, "nearest": float((predict(SECOND, X, y, X_test) == y_test).mean())}


def figures(results: Results) -> dict[str, Figure]:
    """Accuracy by the number of samples on every sphere, and how a deep ReLU network becomes a majority vote."""
    settings = results.settings
    names = {"Bayes rule": "bayes", "optimal": "optimal", "sine": "sine", "erf": "erf", "nearest neighbour": "nearest"}
    drawn = {}
    for d in settings.dims:
        lines = {label: (f"sphere_{d}", name) for label, name in names.items()}
        axes = {"xlabel": "training points", "ylabel": "test accuracy", "logx": True}
        drawn[f"accuracy, dimension {d}"] = plots.curves(results, lines, x=settings.sizes, **axes)
    axes = {"xlabel": "depth", "ylabel": "share of majority labels", "logx": True}
    drawn["ReLU votes"] = plots.curves(results, {"ReLU": ("votes", "relu")}, x=settings.relu_depths, **axes)
    return drawn
