"""No class takes NaN, infinity or text for a number that it is set by: it says so where it is made, estimators in `fit`."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import numpy as np
import pytest

from torchfolio import catalog

FAMILIES = sorted({paper.family for paper in catalog.papers().values()})
INFINITE_IS_A_VALUE = {("InfiniteNetworkClassifier", "depth"), ("LIF", "tau")}


def classes(family: str) -> list[Any]:
    door = importlib.import_module(f"torchfolio.{family}")
    named = (getattr(door, name) for name in door.__all__)
    return [kind for kind in named if inspect.isclass(kind) and inspect.signature(kind).parameters]


def numbers(kind: Any) -> list[str]:
    """Names of settings whose default is a number; none of a class that needs more than settings."""
    parameters = inspect.signature(kind).parameters.values()
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return []
    return [p.name for p in parameters if isinstance(p.default, int | float) and not isinstance(p.default, bool)]


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_are_numbers(family):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(12, 3)), np.arange(12) % 2
    taken = []
    for kind in classes(family):
        estimator = hasattr(kind, "get_params")
        for name in numbers(kind):
            for value in (math.nan, math.inf, "3"):
                if value == math.inf and (kind.__name__, name) in INFINITE_IS_A_VALUE:
                    continue
                try:
                    made = kind(**{name: value})
                    if estimator:
                        made.fit(X, y)
                except (ValueError, TypeError):
                    continue
                taken.append(f"{kind.__name__}({name}={value!r})")
    assert not taken
