"""Fitting digits with 200 units, beside scikit-learn's networks of as many units and its boosted trees."""

from __future__ import annotations

from typing import Any

from torchfolio.data import load
from torchfolio.efficiency.gbnn import GBNNClassifier
from torchfolio.experiments._small_tables import fit_quietly, network, table, trees
from torchfolio.experiments.gbnn import OWN
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    digits = table(load("digits", val=0, normalize=False), 0)
    makers: dict[str, Any] = {
        "ours": lambda: GBNNClassifier(**OWN["digits"], random_state=0),
        "mlp_adam": lambda: network(digits, "adam", 200, 300, (), 0),
        "mlp_lbfgs": lambda: network(digits, "lbfgs", 200, 300, (), 0),
        "boosted_trees": lambda: trees(digits, 0),
    }
    calls = {name: lambda make=make: fit_quietly(make(), digits) for name, make in makers.items()}
    bench.compare("fit digits, 1,257 x 64, 200 units", repeats=3, **calls)
