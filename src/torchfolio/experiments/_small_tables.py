"""Small tables, and what users train on them with scikit-learn: networks by Adam, SGD or L-BFGS, boosted trees."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, ShuffleSplit, StratifiedShuffleSplit, train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

from torchfolio.data import DataSplits
from torchfolio.measure import timed

__all__ = ["SOLVERS", "Table", "fit_quietly", "network", "score", "table", "trained", "trees", "usual"]

SOLVERS = ("adam", "sgd", "lbfgs")
"""Ways to train a network of scikit-learn."""


class Table(NamedTuple):
    """Standardised features and targets, of training and test."""

    X: NDArray[Any]
    X_test: NDArray[Any]
    y: NDArray[Any]
    y_test: NDArray[Any]

    @property
    def regression(self) -> bool:
        """Whether the targets are numbers in place of classes."""
        return self.y.dtype.kind == "f"


def table(data: DataSplits, seed: int) -> Table:
    """All examples of a set, 70 % of them to train and 30 % to test."""
    parts = [part.tensors for part in (data.train, data.val, data.test)]
    X = np.concatenate([x.flatten(1).double().numpy() for x, _ in parts])
    y = np.concatenate([y.numpy() for _, y in parts])
    split: Any = train_test_split(X, y, test_size=0.3, stratify=y if data.classes else None, random_state=seed)
    scaler: Any = StandardScaler().fit(split[0])
    return Table(scaler.transform(split[0]), scaler.transform(split[1]), split[2], split[3])


def network(table: Table, solver: str, units: int, max_iter: int, rates: tuple[float, ...], seed: int) -> Any:
    """One hidden layer of logistic units, trained in the usual way; targets of a regression are standardised.

    Args:
        table: table that it will be trained on.
        solver: one of `SOLVERS`.
        units: number of hidden units.
        max_iter: epochs, or iterations of L-BFGS.
        rates: learning rates to choose from on a fifth of the training examples; none for L-BFGS.
        seed: random seed.
    """
    common: dict[str, Any] = {"hidden_layer_sizes": (units,), "activation": "logistic", "solver": solver,
                              "max_iter": max_iter, "random_state": seed}  # fmt: skip
    if table.regression:
        model: Any = TransformedTargetRegressor(MLPRegressor(**common), transformer=StandardScaler())
        name, held, scoring = "regressor__learning_rate_init", ShuffleSplit, "neg_root_mean_squared_error"
    else:
        model = MLPClassifier(**common)
        name, held, scoring = "learning_rate_init", StratifiedShuffleSplit, "accuracy"
    if not rates:
        return model
    return GridSearchCV(model, {name: rates}, scoring=scoring, cv=held(1, test_size=0.2, random_state=seed))


def trees(table: Table, seed: int) -> Any:
    """Boosted trees at their defaults."""
    return (HistGradientBoostingRegressor if table.regression else HistGradientBoostingClassifier)(random_state=seed)


def score(model: Any, table: Table) -> float:
    """Test accuracy in percent, or the root of the mean squared error."""
    predicted = model.predict(table.X_test)
    if table.regression:
        return float(np.sqrt(np.mean((predicted - table.y_test) ** 2)))
    return 100 * float(np.mean(predicted == table.y_test))


def fit_quietly(model: Any, table: Table) -> None:
    """Fit without the warning that the iterations ran out, which they are meant to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(table.X, table.y)


def usual(table: Table, units: int, max_iter: int, rates: tuple[float, ...], seed: int) -> dict[str, Any]:
    """Networks of `SOLVERS` and boosted trees, untrained; arguments are those of `network`."""
    models = {kind: network(table, kind, units, max_iter, rates if kind != "lbfgs" else (), seed) for kind in SOLVERS}
    return {**models, "trees": trees(table, seed)}


def trained(model: Any, table: Table) -> dict[str, Any]:
    """Test score, seconds of training (of the best candidate where there are several), and what was chosen."""
    _, seconds = timed(fit_quietly, model, table)
    seconds = getattr(model, "refit_time_", seconds)
    return {"seconds": seconds, "score": score(model, table), **getattr(model, "best_params_", {})}
