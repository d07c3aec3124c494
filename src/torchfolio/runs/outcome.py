"""The outcome of an experiment over its seeds, as it is kept and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchfolio.catalog import Paper
from torchfolio.runs import expression
from torchfolio.runs.run import Measured
from torchfolio.runs.store import write_json

FORMAT = 1


@dataclass
class Outcome:
    """What `outcome.json` holds.

    Attributes:
        slug: of the paper.
        scale: of the run.
        status: `"done"`, `"failed"` or `"interrupted"`.
        seeds: all of them.
        settings: of the experiment.
        command: that repeats it.
        started: ISO time.
        seconds: wall time.
        environment: versions and machine.
        error: type, message and traceback of a failure.
        claims: a table for each claim of the catalogue.
        arms: scalars of each arm: mean, standard error, values over seeds.
        figures: name, caption and files.
        format: of the file.
    """

    slug: str
    scale: str
    status: str
    seeds: list[int]
    settings: dict[str, Any]
    command: str
    started: str
    seconds: float
    environment: dict[str, Any]
    error: dict[str, str] | None = None
    claims: list[dict[str, Any]] = field(default_factory=list)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: list[dict[str, str]] = field(default_factory=list)
    format: int = FORMAT

    @property
    def failed_claims(self) -> list[str]:
        """Claims that were measured and do not hold."""
        return [claim["id"] for claim in self.claims if claim["holds"] is False]

    @property
    def ok(self) -> bool:
        """Whether nothing failed. At smoke scale data are toys: only errors count."""
        return self.status == "done" and (self.scale == "smoke" or not self.failed_claims)

    def save(self, folder: Path) -> None:
        """Write `outcome.json`."""
        write_json(folder / "outcome.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Outcome:
        """Read `outcome.json` of a run folder.

        Raises:
            ValueError: if it is not one of this format.
        """
        try:
            body = json.loads((folder / "outcome.json").read_text())
            outcome = cls(**body)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{folder / 'outcome.json'} is not an outcome: {error}") from error
        if outcome.format != FORMAT:
            raise ValueError(f"{folder / 'outcome.json'} has format {outcome.format!r}, expected {FORMAT}")
        return outcome


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and the values over seeds."""
    array = np.asarray(values, dtype=float)
    sem = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return {"mean": float(array.mean()), "sem": sem, "seeds": [float(v) for v in array]}


def aggregate_claims(paper: Paper | None, measured: Sequence[Mapping[str, Measured]]) -> list[dict[str, Any]]:
    """Claims over seeds: a condition is decided on the means, a truth value must hold on every seed."""
    ids = [claim.id for claim in paper.claims] if paper is not None else list(measured[0] if measured else [])
    tables = []
    for id in ids:
        found = [seed[id] for seed in measured if id in seed]
        table: dict[str, Any] = {"id": id, "sentence": id, "paper": None, "what": "", "expression": None, "values": {}}
        if paper is not None:
            claim = paper.claim(id)
            table |= {"sentence": claim.sentence, "paper": claim.paper, "what": claim.measured}
        table |= {
            "holds": None,
            "held_on": 0,
            "of": len(found),
            "note": None if found else "not measured at this scale",
        }
        if found:
            table |= _decide(found)
        tables.append(table)
    return tables


def _decide(found: Sequence[Measured]) -> dict[str, Any]:
    values = {name: summary([m.values[name] for m in found]) for name in found[0].values}
    condition = found[0].expression
    if condition is None:
        true = all(m.holds for m in found)
    else:
        true = expression.holds(condition, {name: v["mean"] for name, v in values.items()})
    lost = [name for name, v in values.items() if not math.isfinite(v["mean"])]
    note = f"{', '.join(lost)} is not a finite number" if lost else None
    return {
        "expression": condition,
        "values": values,
        "holds": true,
        "held_on": sum(m.holds for m in found),
        "note": note,
    }


def aggregate_arms(arms: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Scalars of every arm over seeds."""
    tables: dict[str, dict[str, Any]] = {}
    for name, first in (arms[0] if arms else {}).items():
        scalars = [k for k, v in first.items() if isinstance(v, int | float)]
        tables[name] = {k: summary([float(seed[name][k]) for seed in arms]) for k in scalars}
    return tables


@dataclass(frozen=True)
class Results:
    """Results of all seeds, for an experiment's figures.

    Attributes:
        settings: of the experiment.
        seeds: in order.
        arms: for every seed the results of its arms.
    """

    settings: Any
    seeds: tuple[int, ...]
    arms: tuple[Mapping[str, Mapping[str, Any]], ...]

    def values(self, arm: str, name: str) -> np.ndarray:
        """One value of an arm over seeds, `[seeds, ...]`.

        Raises:
            KeyError: naming the arms or values that there are.
        """
        if arm not in self.arms[0]:
            raise KeyError(f"there is no arm {arm!r}; there are {', '.join(self.arms[0])}")
        if name not in self.arms[0][arm]:
            raise KeyError(f"the arm {arm!r} has no {name!r}; it has {', '.join(self.arms[0][arm])}")
        return np.stack([np.asarray(seed[arm][name], dtype=float) for seed in self.arms])
