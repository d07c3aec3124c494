"""Training time and accuracy of GBNN against what one would use instead, on digits.

200 hidden units in blocks of 2, L-BFGS to 200 iterations a block, against scikit-learn's network of as many units and,
where it is installed, the authors' package (`pip install --no-deps gbnn==0.0.2`), timed in alternation in one process
and on one thread. Run it with

    python benchmarks/bench_gbnn.py [--units 200] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any

from sklearn.base import ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from torchfolio.efficiency.gbnn import GBNNClassifier
from torchfolio.measure import alternate


def models(units: int) -> dict[str, Callable[[], Any]]:
    """A fresh model of each kind."""
    made: dict[str, Callable[[], Any]] = {
        "gbnn": lambda: GBNNClassifier(units, 2, learning_rate=0.5, random_state=0),
        "gbnn_half": lambda: GBNNClassifier(units // 2, 2, learning_rate=0.5, random_state=0),
        "adam": lambda: MLPClassifier((units,), activation="logistic", max_iter=300, random_state=0),
        "lbfgs": lambda: MLPClassifier((units,), activation="logistic", solver="lbfgs", max_iter=300, random_state=0),
    }
    with contextlib.suppress(ModuleNotFoundError):
        package: Any = importlib.import_module("gbnn")
        # Today's scikit-learn takes it for a classifier only when the mixin comes first.
        authors: Any = type("Authors", (ClassifierMixin, package.GNEGNEClassifier), {})
        made["authors"] = lambda: authors(total_nn=units, num_nn_step=2, eta=0.5, random_state=0)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    digits: Any = load_digits()
    parts: Any = train_test_split(digits.data, digits.target, test_size=0.3, stratify=digits.target, random_state=0)
    X, X_test, y, y_test = parts
    scaler: Any = StandardScaler().fit(X)
    X, X_test = scaler.transform(X), scaler.transform(X_test)
    warnings.simplefilter("ignore", ConvergenceWarning)
    candidates = models(arguments.units)
    with threadpool_limits(1):
        timed: dict[str, Any] = {name: lambda make=make: make().fit(X, y) for name, make in candidates.items()}
        print(alternate(**timed, repeats=arguments.rounds))
        for name, make in candidates.items():
            accuracy = (make().fit(X, y).predict(X_test) == y_test).mean()
            print(f"{name:>9}: {100 * accuracy:.1f} % of test digits")


if __name__ == "__main__":
    main()
