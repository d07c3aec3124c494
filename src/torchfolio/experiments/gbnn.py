"""Measures GBNN beside ordinarily trained networks of the same size and boosted trees, on small tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits

from torchfolio.efficiency.gbnn import GBNNClassifier, GBNNRegressor
from torchfolio.experiments._bagged_blocks import Bagged
from torchfolio.experiments._boosted_head import compare_heads
from torchfolio.experiments._small_tables import SOLVERS, Table, score, table, trained, usual
from torchfolio.measure import timed
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
        sets=("digits", "breast_cancer", "diabetes"), share=0.16, max_iter=50, peer_iter=40, rates=(1e-2,),
        images="digits", train_size=500, epochs=2, head_units=16,
    ),
    "quick": Settings(),
    "full": Settings(
        sets=("digits", "breast_cancer", "diabetes", "wine", "iris"), train_size=8000, epochs=10, head_units=200,
        search=True, timed_units=(50, 100, 200, 400),
    ),
}  # fmt: skip

# The settings of each table, fixed before any of it was measured; wine and iris are easy and take those of digits.
OWN: dict[str, dict[str, Any]] = {
    "digits": {"total_units": 200, "units_per_step": 4, "learning_rate": 0.5, "subsample": 0.75},
    "breast_cancer": {"total_units": 200, "units_per_step": 1, "learning_rate": 0.1, "subsample": 0.5},
    "diabetes": {"total_units": 100, "units_per_step": 1, "learning_rate": 0.05, "subsample": 0.5},
}
GRID = {"units_per_step": [1, 2, 4], "learning_rate": [0.05, 0.1, 0.5], "subsample": [0.5, 0.75, 1.0]}


def run(run: Run[Settings]) -> None:
    """Train everything on every table; one thread, as all matrices are small."""
    with threadpool_limits(1):
        tables = {name: table(run.data(name, normalize=False), run.seed) for name in run.settings.sets}
        scores = {name: compared(run, name, one) for name, one in tables.items()}
        ours = {"digits": scores["digits"]["gbnn"], "breast_cancer": scores["breast_cancer"]["gbnn"]}
        ours |= {f"digits_{solver}": scores["digits"][solver] for solver in SOLVERS}
        rmse = scores["diabetes"]
        run.values("accuracy", ours, diabetes_rmse=rmse["gbnn"], diabetes_lbfgs_rmse=rmse["lbfgs"])
        kept = run.arm("switching_off", switched_off, run, tables["digits"])
        first, last = np.asarray(kept["kept_first"]), np.asarray(kept["kept_last"])
        T = len(first) - 1
        parts = {"all_units": first[T], "first_half": first[T // 2], "first_quarter": first[T // 4]}
        run.values("switching_off", parts, without_first_half=last[T - T // 2])
        boosting(run, tables)
        run.arm("deep", compare_heads, run, OWN["digits"])
        if run.settings.timed_units:
            run.arm("time", times, run, tables["digits"])


def own(run: Run[Settings], name: str, **changes: Any) -> dict[str, Any]:
    """GBNN's settings for a table."""
    settings = {**OWN.get(name, OWN["digits"]), "max_iter": run.settings.max_iter, "random_state": run.seed, **changes}
    width = settings["units_per_step"]
    settings["total_units"] = max(width, round(settings["total_units"] * run.settings.share / width) * width)
    return settings


def compared(run: Run[Settings], name: str, table: Table) -> dict[str, float]:
    """Test scores of GBNN and its peers, an arm each."""
    s, settings = run.settings, own(run, name)
    gbnn = (GBNNRegressor if table.regression else GBNNClassifier)(**settings)
    models: dict[str, Any] = {"gbnn": gbnn}
    if s.search:
        models["gbnn_searched"] = GridSearchCV(gbnn, GRID, cv=3, n_jobs=-1)
    models |= usual(table, settings["total_units"], s.peer_iter, s.rates, run.seed)
    return {arm: run.arm(f"{name}_{arm}", trained, model, table)["score"] for arm, model in models.items()}


def switched_off(run: Run[Settings], table: Table) -> dict[str, Any]:
    """Accuracy on digits with the first so many blocks, and with the last so many."""
    model = GBNNClassifier(**own(run, "digits")).fit(table.X, table.y)
    start = np.broadcast_to(model.staged_intercepts_[0], (len(table.X_test), 10))
    F = np.stack([start, *model.staged_decision_function(table.X_test)])
    # Without the first t blocks, what is left is the start and the later blocks' part of the sum.
    first, last = (100 * (scores.argmax(2) == table.y_test).mean(1) for scores in (F, F[-1] - F + F[0]))
    return {"kept_first": first, "kept_last": last[::-1]}


def boosting(run: Run[Settings], tables: Mapping[str, Table]) -> None:
    """Courses of training, of GBNN and of blocks that do not see what those before them left."""
    boosted = run.arm("boosted", course, GBNNClassifier(**own(run, "digits")), tables["digits"])
    bagged = run.arm("bagged", course, Bagged(**own(run, "digits")), tables["digits"])
    whole = run.arm("whole", course, GBNNRegressor(**own(run, "diabetes", subsample=1.0)), tables["diabetes"])
    loss = np.asarray(whole["train_loss"])
    losses = {"boosted_loss": boosted["train_loss"][-1], "bagged_loss": bagged["train_loss"][-1]}
    run.values("boosting_matters", losses, largest_rise=np.max(loss[1:] / loss[:-1] - 1))


def course(model: Any, table: Table) -> dict[str, Any]:
    """Training loss block by block, and test score."""
    model.fit(table.X, table.y)
    return {"train_loss": model.train_loss_, "score": score(model, table)}


def times(run: Run[Settings], table: Table) -> dict[str, Any]:
    """Seconds of training against the number of units, on digits."""
    seconds = []
    for units in run.progress(run.settings.timed_units, "units"):
        model = GBNNClassifier(**{**own(run, "digits"), "total_units": units})
        seconds.append(timed(model.fit, table.X, table.y)[1])
    return {"seconds": seconds}


def figures(results: Results) -> plots.Figures:
    """Scores beside the peers, accuracy against units kept, training loss with and without fresh residuals."""
    s, pictures = results.settings, {}
    arms = ("gbnn", *(["gbnn_searched"] if s.search else []), *SOLVERS, "trees")
    for name in s.sets:
        scores = {arm.replace("gbnn", "GBNN"): (f"{name}_{arm}", "score") for arm in arms}
        kind = "RMSE" if name == "diabetes" else "accuracy (%)"
        pictures[name] = plots.bars(results, scores, ylabel=f"test {kind} on {name.replace('_', ' ')}")
    kept = {f"units trained {which} are kept": ("switching_off", f"kept_{which}") for which in ("first", "last")}
    share = np.linspace(0, 100, results.values("switching_off", "kept_first").shape[1])
    pictures["units kept"] = plots.curves(
        results, kept, x=share, xlabel="hidden units kept (%)", ylabel="test accuracy on digits (%)"
    )
    losses = {
        "residuals of the sum (GBNN)": ("boosted", "train_loss"),
        "residuals of the start": ("bagged", "train_loss"),
    }
    pictures["training loss"] = plots.curves(
        results, losses, xlabel="blocks", ylabel="training cross-entropy on digits (nats)", logy=True
    )
    if s.timed_units:
        seconds = {"GBNN": ("time", "seconds")}
        pictures["training time"] = plots.curves(
            results, seconds, x=s.timed_units, xlabel="hidden units", ylabel="training time (s)"
        )
    return pictures
