"""Measures limits of wide and deep networks on the sphere against the Bayes rule, the nearest neighbour, each other."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from torchfolio.experiments._sphere_classes import draw, two_clusters
from torchfolio.runs import Results, Run, pick, plots, setting
from torchfolio.theory.infinite_classifiers import (
    DualActivation,
    HermiteActivation,
    InfiniteNetworkClassifier,
    OptimalActivation,
)

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
    arms = [run.arm(f"sphere_{dim}", on_sphere, run, dim) for dim in run.settings.dims]
    circle = {name: np.asarray(values) for name, values in arms[0].items()}
    gap = circle["bayes"] - circle["optimal"]
    largest = {name: values[-1] for name, values in circle.items()}
    run.values("optimality", pick(largest, "bayes", "optimal", "nearest"), first_gap=gap[0], last_gap=gap[-1])
    run.values("hilbert", agreement=largest["hilbert_agreement"])
    run.values("control_large_exponent", pick(largest, "optimal", "exponent_2"))
    run.values("nearest_neighbor", run.arm("nearest", like_the_nearest, run))
    vote = run.arm("votes", majority_votes, run)
    run.values("majority_vote", cubic=min(vote["cubic"]), relu=vote["relu"][-1], on_circle=vote["cubic_on_circle"][-1])
    run.values("control_small_exponent", run.arm("clusters", small_cluster, run))
    if run.settings.images:
        run.arm("images", odd_digits, run)


def predict(activation: Any, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, **settings: Any) -> np.ndarray:
    """Labels that the infinite network gives to test points; a tied vote needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the majority vote is tied")
        return InfiniteNetworkClassifier(activation, **settings).fit(X, y).predict(X_test)


def on_sphere(run: Run[Settings], dim: int) -> dict[str, Any]:
    """Accuracies by the number of training points, and agreement of the optimal network with the Hilbert kernel."""
    settings, generator = run.settings, np.random.default_rng(run.seed)
    X_test, y_test, bayes = draw(dim, settings.test_size, generator)
    X, y, _ = draw(dim, settings.sizes[-1], generator)
    activations = {"optimal": "optimal", "sine": "sine", "erf": "erf", "nearest": SECOND, "relu": "relu"}
    if dim == 1:
        activations["exponent_2"] = OptimalActivation(2)
    scores: dict[str, list[float]] = defaultdict(list)
    for n in settings.sizes:
        labels = {name: predict(phi, X[:n], y[:n], X_test) for name, phi in activations.items()}
        # Devroye's Hilbert kernel: votes by the distance to the power -dim.
        squares = np.maximum(2 - 2 * X_test @ X[:n].T, 1e-300)
        labels["hilbert"] = (squares ** (-dim / 2) @ (2 * y[:n] - 1) > 0).astype(int)
        for name, said in {**labels, "bayes": bayes}.items():
            scores[name].append(np.mean(said == y_test))
        scores["hilbert_agreement"].append(np.mean(labels["optimal"] == labels["hilbert"]))
    return scores


def like_the_nearest(run: Run[Settings]) -> dict[str, float]:
    """Agreement with the nearest neighbour; on the sphere whose points a network of depth 14 can tell apart."""
    settings, generator = run.settings, np.random.default_rng(run.seed)
    (X, y, _), (X_test, _, _) = (draw(DEEP_DIM, n, generator) for n in (settings.sizes[-1], settings.test_size))
    nearest = KNeighborsClassifier(1).fit(X, y).predict(X_test)
    depths = {"depth_14": {"depth": 14}, "infinite": {}}
    return {name: np.mean(predict(SECOND, X, y, X_test, **depth) == nearest) for name, depth in depths.items()}


def majority_votes(run: Run[Settings]) -> dict[str, list[float]]:
    """Share of test points that get the majority's label, by depth."""
    settings, generator = run.settings, np.random.default_rng(run.seed)
    shares = {}
    for name, dim, phi, depths in (
        ("cubic", DEEP_DIM, CUBIC, (20, 30, 40)),
        ("cubic_on_circle", 1, CUBIC, (20, 30, 40)),
        ("relu", DEEP_DIM, "relu", settings.relu_depths),
    ):
        (X, y, _), (X_test, _, _) = (draw(dim, n, generator) for n in (settings.vote_size, settings.vote_test_size))
        majority = int(2 * y.sum() > len(y))
        shares[name] = [np.mean(predict(phi, X, y, X_test, depth=depth) == majority) for depth in depths]
    return shares


def small_cluster(run: Run[Settings]) -> dict[str, float]:
    """Agreement with the Bayes rule in the small one of two clusters, where it is negative."""
    settings = run.settings
    X, y, X_test = two_clusters(settings.sizes[-1], settings.test_size // 2, np.random.default_rng(run.seed))
    cases = {"optimal": OptimalActivation(1), "exponent_2": OptimalActivation(2), "small_exponent": FLAT}
    return {name: np.mean(predict(phi, X, y, X_test) == 0) for name, phi in cases.items()}


def odd_digits(run: Run[Settings]) -> dict[str, float]:
    """Odd digits from even ones: accuracies of the infinite network and of the nearest neighbour, and the dimension."""
    train_size, test_size = run.settings.image_sizes
    splits = run.data(str(run.settings.images), train_size=train_size, test_size=test_size, normalize=False)
    (X, y), (X_test, y_test) = (
        (part.tensors[0].flatten(1).double().numpy(), part.tensors[1].numpy() % 2)
        for part in (splits.train, splits.test)
    )
    model = InfiniteNetworkClassifier(intrinsic_dim="estimate").fit(X, y)
    scores = {"optimal": model.score(X_test, y_test), "dimension": float(model.intrinsic_dim_ or 0)}
    return {**scores, "nearest": np.mean(predict(SECOND, X, y, X_test) == y_test)}


def figures(results: Results) -> plots.Figures:
    """Accuracy by the number of samples on every sphere, and how a deep ReLU network becomes a majority vote."""
    settings = results.settings
    names = {"Bayes rule": "bayes", "optimal": "optimal", "sine": "sine", "erf": "erf", "nearest neighbour": "nearest"}
    axes = {"xlabel": "training points", "ylabel": "test accuracy", "logx": True}
    drawn = {}
    for dim in settings.dims:
        lines = {label: (f"sphere_{dim}", name) for label, name in names.items()}
        drawn[f"accuracy, dimension {dim}"] = plots.curves(results, lines, x=settings.sizes, **axes)
    axes |= {"xlabel": "depth", "ylabel": "share of majority labels"}
    drawn["ReLU votes"] = plots.curves(results, {"ReLU": ("votes", "relu")}, x=settings.relu_depths, **axes)
    return drawn
