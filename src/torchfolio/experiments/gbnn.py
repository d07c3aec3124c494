"""Measures GBNN beside ordinarily trained networks of the same size and boosted trees, on small tables.

Longer than most because every table has peers of its own: networks trained in four ways, and boosted trees.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.random import RandomState
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

from torchfolio.efficiency.gbnn import Array, GBNNClassifier, GBNNRegressor, MulticlassLoss, boost_head
from torchfolio.engine import evaluate, fit
from torchfolio.models import ConvNet
from torchfolio.runs import Results, Run


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long.

    Attributes:
        sets: tables; digits, breast_cancer and diabetes carry the claims.
        share: of the hidden units that every table's network gets otherwise.
        max_iter: L-BFGS iterations for each block.
        peer_iter: epochs of Adam and SGD, iterations of L-BFGS.
        rates: learning rates that Adam and SGD choose from, on a part held out of the training examples.
        images: data of the deep network.
        train_size: its training images.
        epochs: its passes over them.
        head_units: hidden units of its boosted head.
        search: choose GBNN's own settings by cross-validation as well.
        timed_units: sizes whose training is timed.
    """

    sets: tuple[str, ...] = ("digits", "breast_cancer", "diabetes", "wine")
    share: float = 1.0
    max_iter: int = 200
    peer_iter: int = 300
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    images: str = "mnist10k"
    train_size: int = 3000
    epochs: int = 8
    head_units: int = 100
    search: bool = False
    timed_units: tuple[int, ...] = ()


SCALES = {
    "smoke": Settings(
        sets=("digits", "breast_cancer", "diabetes"),
        share=0.16,
        max_iter=50,
        peer_iter=40,
        rates=(1e-2,),
        images="digits",
        train_size=500,
        epochs=2,
        head_units=16,
    ),
    "quick": Settings(),
    "full": Settings(
        sets=("digits", "breast_cancer", "diabetes", "wine", "iris"),
        train_size=8000,
        epochs=10,
        head_units=200,
        search=True,
        timed_units=(50, 100, 200, 400),
    ),
}

# The settings of each table, fixed before any of it was measured; wine and iris are easy and take those of digits.
OWN: dict[str, dict[str, Any]] = {
    "digits": {"total_units": 200, "units_per_step": 4, "learning_rate": 0.5, "subsample": 0.75},
    "breast_cancer": {"total_units": 200, "units_per_step": 1, "learning_rate": 0.1, "subsample": 0.5},
    "diabetes": {"total_units": 100, "units_per_step": 1, "learning_rate": 0.05, "subsample": 0.5},
}
GRID = {"units_per_step": [1, 2, 4], "learning_rate": [0.05, 0.1, 0.5], "subsample": [0.5, 0.75, 1.0]}

Table = tuple[Array, Array, Array, Array]


class Bagged(GBNNClassifier):
    """The control: every block is fitted to the residuals of the constant start, and only the steps see the sum."""

    def _grow(self, Z: Array, Y: Array, loss: Any, rng: RandomState, held: Any) -> Any:
        return super()._grow(Z, Y, _Frozen(loss.start(Y)), rng, held)


class _Frozen(MulticlassLoss):
    def __init__(self, start: Array) -> None:
        self.constant = start

    def residual(self, y: Array, F: Array) -> Array:
        return super().residual(y, np.broadcast_to(self.constant, F.shape))


def run(run: Run[Settings]) -> None:
    """Train everything on every table; one thread, as all matrices are small."""
    with threadpool_limits(1):
        tables = {name: _table(run, name) for name in run.settings.sets}
        done = {name: _compare(run, name, table) for name, table in tables.items()}
        _claim_accuracy(run, done)
        _switch_off(run, tables["digits"])
        _boosting(run, tables)
        run.arm("deep", _deep, run)
        if run.settings.timed_units:
            run.arm("time", _times, run, tables["digits"])


def _table(run: Run[Settings], name: str) -> Table:
    """Standardised training and test features and targets, 70 % and 30 %."""
    data = run.data(name, normalize=False)
    parts = [part.tensors for part in (data.train, data.val, data.test)]
    X = np.concatenate([x.flatten(1).double().numpy() for x, _ in parts])
    y = np.concatenate([y.numpy() for _, y in parts])
    labels = y if data.classes else None
    split: Any = train_test_split(X, y, test_size=0.3, stratify=labels, random_state=run.seed)
    scaler: Any = StandardScaler().fit(split[0])
    return scaler.transform(split[0]), scaler.transform(split[1]), split[2], split[3]


def _own(run: Run[Settings], name: str, **changes: Any) -> dict[str, Any]:
    """GBNN's settings for a table."""
    own = {**OWN.get(name, OWN["digits"]), "max_iter": run.settings.max_iter, "random_state": run.seed, **changes}
    width = own["units_per_step"]
    own["total_units"] = max(width, round(own["total_units"] * run.settings.share / width) * width)
    return own


def _is_regression(table: Table) -> bool:
    return table[2].dtype.kind == "f"


def _score(model: Any, table: Table) -> float:
    """Test accuracy in percent, or the root of the mean squared error."""
    _, X, _, y = table
    predicted = model.predict(X)
    if _is_regression(table):
        return float(np.sqrt(np.mean((predicted - y) ** 2)))
    return 100 * float(np.mean(predicted == y))


def _compare(run: Run[Settings], name: str, table: Table) -> dict[str, float]:
    """Test scores of GBNN and its peers, an arm each."""
    regression = _is_regression(table)
    own = _own(run, name)
    models: dict[str, Any] = {"gbnn": (GBNNRegressor if regression else GBNNClassifier)(**own)}
    if run.settings.search:
        models["gbnn_searched"] = GridSearchCV(models["gbnn"], GRID, cv=3, n_jobs=-1)
    for solver in ("adam", "sgd", "lbfgs"):
        models[solver] = _mlp(run, solver, own["total_units"], regression)
    trees = HistGradientBoostingRegressor if regression else HistGradientBoostingClassifier
    models["trees"] = trees(random_state=run.seed)
    return {arm: run.arm(f"{name}_{arm}", _train, run, model, arm, table)["score"] for arm, model in models.items()}


def _mlp(run: Run[Settings], solver: str, units: int, regression: bool) -> Any:
    """A network of as many logistic units, trained in the usual way; targets of a regression are standardised."""
    common: dict[str, Any] = {
        "hidden_layer_sizes": (units,),
        "activation": "logistic",
        "solver": solver,
        "max_iter": run.settings.peer_iter,
        "random_state": run.seed,
    }
    if regression:
        return TransformedTargetRegressor(MLPRegressor(**common), transformer=StandardScaler())
    return MLPClassifier(**common)


def _train(run: Run[Settings], model: Any, arm: str, table: Table) -> Mapping[str, Any]:
    rate = _best_rate(run, model, table) if arm in ("adam", "sgd") else None
    if rate is not None:
        model = _with_rate(model, rate)
    start = time.perf_counter()
    _fit_all(model, table)
    outcome: dict[str, Any] = {"seconds": time.perf_counter() - start, "score": _score(model, table)}
    if rate is not None:
        outcome["learning_rate"] = rate
    return outcome | (model.best_params_ if arm == "gbnn_searched" else {})


def _with_rate(model: Any, rate: float) -> Any:
    fresh: Any = clone(model)
    nested = isinstance(model, TransformedTargetRegressor)
    return fresh.set_params(**{"regressor__learning_rate_init" if nested else "learning_rate_init": rate})


def _best_rate(run: Run[Settings], model: Any, table: Table) -> float:
    """The learning rate that does best on a fifth of the training examples, trained on the others."""
    X, _, y, _ = table
    labels = None if _is_regression(table) else y
    parts: Any = train_test_split(X, y, test_size=0.2, stratify=labels, random_state=run.seed)
    scores = {}
    for rate in run.settings.rates:
        candidate = _with_rate(model, rate)
        _fit_all(candidate, tuple(parts))
        scores[rate] = _score(candidate, tuple(parts))
    return min(scores, key=lambda r: scores[r]) if labels is None else max(scores, key=lambda r: scores[r])


def _fit_all(model: Any, table: Table) -> None:
    """Fit without the warning that the iterations ran out, which they are meant to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(table[0], table[2])


def _claim_accuracy(run: Run[Settings], done: dict[str, dict[str, float]]) -> None:
    run.values(
        "accuracy",
        {
            "digits": done["digits"]["gbnn"],
            "digits_adam": done["digits"]["adam"],
            "digits_lbfgs": done["digits"]["lbfgs"],
            "digits_sgd": done["digits"]["sgd"],
            "breast_cancer": done["breast_cancer"]["gbnn"],
            "diabetes_rmse": done["diabetes"]["gbnn"],
            "diabetes_lbfgs_rmse": done["diabetes"]["lbfgs"],
        },
    )


def _switch_off(run: Run[Settings], table: Table) -> None:
    """Accuracy on digits with the first so many blocks, and with the last so many."""

    def measure() -> dict[str, Any]:
        X, X_test, y, y_test = table
        model = GBNNClassifier(**_own(run, "digits")).fit(X, y)
        scores = np.stack([np.broadcast_to(model.staged_intercepts_[0], (len(X_test), 10))])
        F = np.concatenate([scores, np.stack(list(model.staged_decision_function(X_test)))])
        # Without the first t blocks, what is left is the start and the later blocks' part of the sum.
        kept_first = [float(np.mean(f.argmax(1) == y_test)) for f in F]
        kept_last = [float(np.mean((F[-1] - f + F[0]).argmax(1) == y_test)) for f in F]
        return {"kept_first": 100 * np.array(kept_first), "kept_last": 100 * np.array(kept_last[::-1])}

    done = run.arm("switching_off", measure)
    first, last = np.asarray(done["kept_first"]), np.asarray(done["kept_last"])
    T = len(first) - 1
    run.values(
        "switching_off",
        {
            "all_units": first[T],
            "first_half": first[T // 2],
            "first_quarter": first[T // 4],
            "without_first_half": last[T - T // 2],
        },
    )


def _boosting(run: Run[Settings], tables: dict[str, Table]) -> None:
    def curve(model: Any, name: str) -> dict[str, Any]:
        model.fit(tables[name][0], tables[name][2])
        return {"train_loss": model.train_loss_, "score": _score(model, tables[name])}

    boosted = run.arm("boosted", curve, GBNNClassifier(**_own(run, "digits")), "digits")
    bagged = run.arm("bagged", curve, Bagged(**_own(run, "digits")), "digits")
    whole = run.arm("whole", curve, GBNNRegressor(**_own(run, "diabetes", subsample=1.0)), "diabetes")
    loss = np.asarray(whole["train_loss"])
    run.values(
        "boosting_matters",
        {
            "largest_rise": float(np.max(loss[1:] / loss[:-1] - 1)),
            "boosted_loss": boosted["train_loss"][-1],
            "bagged_loss": bagged["train_loss"][-1],
        },
    )


def _deep(run: Run[Settings]) -> dict[str, Any]:
    """A convolutional network's own softmax head against a boosted head on the same frozen features."""
    settings = run.settings
    data = run.data(settings.images, train_size=settings.train_size)
    net = ConvNet(data.num_classes, data.shape[0], widths=(16, 32, 64))
    adam = partial(torch.optim.Adam, lr=3e-3)
    fit(net, data.train, optimizer=adam, epochs=settings.epochs, batch_size=64, seed=run.seed, device=run.device)
    *layers, head = net.children()
    backbone = nn.Sequential(*layers, *list(head.children())[:-1])
    own = {**OWN["digits"], "total_units": settings.head_units, "max_iter": settings.max_iter}
    boosted = boost_head(backbone, data.train, **own, random_state=run.seed)
    x, y = (tensor.to(run.device) for tensor in data.test.tensors)
    with torch.no_grad():
        features = backbone.eval()(x).cpu().double().numpy()
        accuracy = float((boosted.network.eval()(x).argmax(1) == y).float().mean())
    quarter = settings.head_units // 4 // own["units_per_step"] * own["units_per_step"]
    small = boosted.estimator.predict(features, n_units=quarter)
    return {
        "softmax_head": 100 * evaluate(net, data.test)["accuracy"],
        "boosted_head": 100 * accuracy,
        "boosted_quarter": 100 * float(np.mean(small == y.cpu().numpy())),
    }


def _times(run: Run[Settings], table: Table) -> dict[str, Any]:
    """Seconds of training against the number of units, on digits."""
    seconds = []
    for units in run.progress(run.settings.timed_units, "units"):
        start = time.perf_counter()
        GBNNClassifier(**{**_own(run, "digits"), "total_units": units}).fit(table[0], table[2])
        seconds.append(time.perf_counter() - start)
    return {"units": list(run.settings.timed_units), "seconds": seconds}


def figures(results: Results) -> dict[str, Figure]:
    """Scores beside the peers, accuracy against units kept, training loss with and without fresh residuals."""
    made = {"scores": _scores(results), "units kept": _kept(results), "training loss": _losses(results)}
    if results.settings.timed_units:
        made["training time"] = _time_figure(results)
    return made


def _scores(results: Results) -> Figure:
    sets = results.settings.sets
    fig, axes = plt.subplots(1, len(sets), figsize=(2.8 * len(sets), 3.6), layout="constrained", squeeze=False)
    arms = ["gbnn", *(["gbnn_searched"] if results.settings.search else []), "adam", "sgd", "lbfgs", "trees"]
    for ax, name in zip(axes[0], sets, strict=True):
        for k, arm in enumerate(arms):
            values = results.values(f"{name}_{arm}", "score")
            ax.errorbar(k, values.mean(), yerr=values.std(), fmt="o", capsize=4, color=f"C{k}")
            ax.plot([k] * len(values), values, ".", color="grey", alpha=0.6, zorder=0)
        ax.set_xticks(range(len(arms)), [arm.replace("gbnn", "GBNN") for arm in arms], rotation=60)
        ax.set(
            title=name, ylabel="test RMSE" if name == "diabetes" else "test accuracy (%)", xlim=(-0.5, len(arms) - 0.5)
        )
        ax.grid(alpha=0.3)
    return fig


def _kept(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, label in (("kept_first", "units trained first are kept"), ("kept_last", "units trained last are kept")):
        values = results.values("switching_off", key)
        share = np.linspace(0, 100, values.shape[1])
        ax.plot(share, values.mean(0), label=label)
        ax.fill_between(share, values.min(0), values.max(0), alpha=0.2)
    ax.set(xlabel="hidden units kept (%)", ylabel="test accuracy on digits (%)")
    ax.legend(loc="lower right")
    ax.grid(alpha=0.3)
    return fig


def _losses(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, label in (("boosted", "residuals of the sum (GBNN)"), ("bagged", "residuals of the start")):
        values = results.values(arm, "train_loss")
        ax.plot(values.mean(0), label=label)
        ax.fill_between(range(values.shape[1]), values.min(0), values.max(0), alpha=0.2)
    ax.set(xlabel="blocks", ylabel="training cross-entropy on digits (nats)", yscale="log")
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def _time_figure(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    seconds = results.values("time", "seconds")
    ax.errorbar(results.settings.timed_units, seconds.mean(0), yerr=seconds.std(0), marker="o", capsize=3)
    ax.set(xlabel="hidden units", ylabel="training time on digits (s)", xlim=(0, None), ylim=(0, None))
    ax.grid(alpha=0.3)
    return fig
