"""Measures GBNN beside ordinarily trained networks of the same size and boosted trees, on small tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import RandomState
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits

from torchfolio.efficiency.gbnn import Array, GBNNClassifier, GBNNRegressor, MulticlassLoss
from torchfolio.experiments._boosted_head import compare_heads
from torchfolio.experiments._small_tables import Table, fit_quietly, network, score, table, trees
from torchfolio.runs import Results, Run, plots, setting


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long."""

    sets: tuple[str, ...] = setting(
        ("digits", "breast_cancer", "diabetes", "wine"), "tables; digits, breast_cancer and diabetes carry the claims"
    )
    share: float = setting(1.0, "share of the hidden units that every table's network gets otherwise")
    max_iter: int = setting(200, "iterations of L-BFGS for each block")
    peer_iter: int = setting(300, "epochs of Adam and SGD, iterations of L-BFGS")
    rates: tuple[float, ...] = setting(
        (1e-3, 1e-2, 1e-1), "learning rates that Adam and SGD choose from, on a part held out of the training examples"
    )
    images: str = setting("mnist10k", "data of the deep network")
    train_size: int = setting(3000, "its training images")
    epochs: int = setting(8, "its passes over them")
    head_units: int = setting(100, "hidden units of its boosted head")
    search: bool = setting(False, "whether to choose GBNN's own settings by cross-validation as well")
    timed_units: tuple[int, ...] = setting((), "sizes whose training is timed")


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
        tables = {name: table(run.data(name, normalize=False), run.seed) for name in run.settings.sets}
        done = {
            f"{name}_{arm}": score for name, one in tables.items() for arm, score in _compare(run, name, one).items()
        }
        names = {"digits": "digits_gbnn", "breast_cancer": "breast_cancer_gbnn", "diabetes_rmse": "diabetes_gbnn"}
        names |= {"diabetes_lbfgs_rmse": "diabetes_lbfgs"} | {
            n: n for n in ("digits_adam", "digits_lbfgs", "digits_sgd")
        }
        run.values("accuracy", {name: done[arm] for name, arm in names.items()})
        _switch_off(run, tables["digits"])
        _boosting(run, tables)
        run.arm("deep", compare_heads, run, OWN["digits"])
        if run.settings.timed_units:
            run.arm("time", _times, run, tables["digits"])


def _own(run: Run[Settings], name: str, **changes: Any) -> dict[str, Any]:
    """GBNN's settings for a table."""
    own = {**OWN.get(name, OWN["digits"]), "max_iter": run.settings.max_iter, "random_state": run.seed, **changes}
    width = own["units_per_step"]
    own["total_units"] = max(width, round(own["total_units"] * run.settings.share / width) * width)
    return own


def _compare(run: Run[Settings], name: str, table: Table) -> dict[str, float]:
    """Test scores of GBNN and its peers, an arm each."""
    s, own = run.settings, _own(run, name)
    gbnn = (GBNNRegressor if table.regression else GBNNClassifier)(**own)
    models: dict[str, Any] = {"gbnn": gbnn}
    if s.search:
        models["gbnn_searched"] = GridSearchCV(gbnn, GRID, cv=3, n_jobs=-1)
    for solver in ("adam", "sgd", "lbfgs"):
        rates = s.rates if solver != "lbfgs" else ()
        models[solver] = network(table, solver, own["total_units"], s.peer_iter, rates, run.seed)
    models["trees"] = trees(table, run.seed)
    return {arm: run.arm(f"{name}_{arm}", _train, model, table)["score"] for arm, model in models.items()}


def _train(model: Any, table: Table) -> Mapping[str, Any]:
    start = time.perf_counter()
    fit_quietly(model, table)
    seconds = getattr(model, "refit_time_", time.perf_counter() - start)
    return {"seconds": seconds, "score": score(model, table), **getattr(model, "best_params_", {})}


def _switch_off(run: Run[Settings], table: Table) -> None:
    """Accuracy on digits with the first so many blocks, and with the last so many."""

    def measure() -> dict[str, Any]:
        model = GBNNClassifier(**_own(run, "digits")).fit(table.X, table.y)
        start = np.broadcast_to(model.staged_intercepts_[0], (len(table.X_test), 10))
        F = np.stack([start, *model.staged_decision_function(table.X_test)])
        # Without the first t blocks, what is left is the start and the later blocks' part of the sum.
        kept_first = [float(np.mean(f.argmax(1) == table.y_test)) for f in F]
        kept_last = [float(np.mean((F[-1] - f + F[0]).argmax(1) == table.y_test)) for f in F]
        return {"kept_first": 100 * np.array(kept_first), "kept_last": 100 * np.array(kept_last[::-1])}

    done = run.arm("switching_off", measure)
    first, last = np.asarray(done["kept_first"]), np.asarray(done["kept_last"])
    T = len(first) - 1
    run.values(
        "switching_off", all_units=first[T], first_half=first[T // 2], first_quarter=first[T // 4],
        without_first_half=last[T - T // 2],
    )  # fmt: skip


def _boosting(run: Run[Settings], tables: dict[str, Table]) -> None:
    def curve(model: Any, name: str) -> dict[str, Any]:
        model.fit(tables[name].X, tables[name].y)
        return {"train_loss": model.train_loss_, "score": score(model, tables[name])}

    boosted = run.arm("boosted", curve, GBNNClassifier(**_own(run, "digits")), "digits")
    bagged = run.arm("bagged", curve, Bagged(**_own(run, "digits")), "digits")
    whole = run.arm("whole", curve, GBNNRegressor(**_own(run, "diabetes", subsample=1.0)), "diabetes")
    loss = np.asarray(whole["train_loss"])
    run.values(
        "boosting_matters", largest_rise=float(np.max(loss[1:] / loss[:-1] - 1)),
        boosted_loss=boosted["train_loss"][-1], bagged_loss=bagged["train_loss"][-1],
    )  # fmt: skip


def _times(run: Run[Settings], table: Table) -> dict[str, Any]:
    """Seconds of training against the number of units, on digits."""
    seconds = []
    for units in run.progress(run.settings.timed_units, "units"):
        start = time.perf_counter()
        GBNNClassifier(**{**_own(run, "digits"), "total_units": units}).fit(table.X, table.y)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def figures(results: Results) -> plots.Figures:
    """Scores beside the peers, accuracy against units kept, training loss with and without fresh residuals."""
    s = results.settings
    arms = ("gbnn", *(["gbnn_searched"] if s.search else []), "adam", "sgd", "lbfgs", "trees")
    kept = {f"units trained {which} are kept": ("switching_off", f"kept_{which}") for which in ("first", "last")}
    losses = {
        "residuals of the sum (GBNN)": ("boosted", "train_loss"),
        "residuals of the start": ("bagged", "train_loss"),
    }
    made = {
        name: plots.bars(
            results, {arm.replace("gbnn", "GBNN"): (f"{name}_{arm}", "score") for arm in arms},
            ylabel=f"test {'RMSE' if name == 'diabetes' else 'accuracy (%)'} on {name.replace('_', ' ')}",
        )
        for name in s.sets
    }  # fmt: skip
    share = np.linspace(0, 100, results.values("switching_off", "kept_first").shape[1])
    made["units kept"] = plots.curves(
        results, kept, x=share, xlabel="hidden units kept (%)", ylabel="test accuracy on digits (%)"
    )
    made["training loss"] = plots.curves(
        results, losses, xlabel="blocks", ylabel="training cross-entropy on digits (nats)", logy=True
    )
    if s.timed_units:
        made["training time"] = plots.curves(
            results, {"GBNN": ("time", "seconds")}, x=s.timed_units, xlabel="hidden units", ylabel="training time (s)"
        )
    return made
