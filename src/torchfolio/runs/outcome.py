"""The outcome of an experiment over its seeds, as it is kept and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchfolio.catalog import Claim
from torchfolio.runs import expression
from torchfolio.runs.store import write_json

FORMAT = 1


@dataclass
class Outcome:
    """What `outcome.json` holds.

    Attributes:
        slug: slug of the paper.
        scale: scale of the run.
        status: `"done"`, `"failed"` or `"interrupted"`.
        seeds: all of them.
        settings: settings of the experiment.
        command: command that repeats it.
        started: ISO time.
        seconds: seconds that the arms took, all seeds together, whenever and wherever they ran.
        environment: versions and machine.
        error: type, message and traceback of a failure.
        claims: a table for each claim of the catalogue.
        arms: scalars of each arm: mean, standard error, values over seeds.
        figures: name, caption and files.
        format: format of the file.
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
        """Whether nothing failed. At smoke scale nothing is judged: only errors count."""
        return self.status == "done" and not self.failed_claims

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
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / 'outcome.json'} is not an outcome: {error}") from error
        if outcome.format != FORMAT:
            raise ValueError(f"{folder / 'outcome.json'} has format {outcome.format!r}, expected {FORMAT}")
        return outcome


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and the values over seeds."""
    array = np.asarray(values, dtype=float)
    sem = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return {"mean": float(array.mean()), "sem": sem, "seeds": [float(v) for v in array]}


def aggregate_claims(
    claims: Iterable[Claim], measured: Sequence[Mapping[str, Mapping[str, float]]], *, judge: bool = True
) -> list[dict[str, Any]]:
    """Claims over seeds: a condition is decided on the means, or must hold on every seed where the claim says so.

    Args:
        claims: claims of the paper.
        measured: values of claims by name, for every seed.
        judge: whether to decide at all; toy data decide nothing.
    """
    tables = []
    for claim in claims:
        by_seed = [seed[claim.id] for seed in measured if claim.id in seed]
        table: dict[str, Any] = {
            "id": claim.id, "sentence": claim.sentence, "paper": claim.paper, "what": claim.measured,
            "expression": claim.holds, "values": {}, "holds": None, "held_on": 0, "of": len(by_seed),
            "note": None if by_seed else "not measured at this scale",
        }  # fmt: skip
        if by_seed:
            table["values"] = {name: summary([values[name] for values in by_seed]) for name in by_seed[0]}
            table |= _decide(claim, by_seed, table["values"]) if judge else {"note": "toy data: not judged"}
        tables.append(table)
    return tables


def _decide(claim: Claim, found: Sequence[Mapping[str, float]], values: Mapping[str, Any]) -> dict[str, Any]:
    if claim.holds is None:
        return {"note": "the catalogue has no condition"}
    each = [expression.holds(claim.holds, seed) for seed in found]
    mean = expression.holds(claim.holds, {name: v["mean"] for name, v in values.items()})
    lost = [name for name, v in values.items() if not math.isfinite(v["mean"])]
    note = f"{', '.join(lost)} is not a finite number" if lost else None
    return {"holds": all(each) if claim.every_seed else mean, "held_on": sum(each), "note": note}


def aggregate_arms(arms: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Scalars of every arm over the seeds that have it: what a seed chose on validation data, others may lack."""
    tables: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for seed in arms for name in seed):
        by_seed = [seed[name] for seed in arms if name in seed]
        scalars = [k for k, v in by_seed[0].items() if isinstance(v, int | float)]
        tables[name] = {k: summary([float(values[k]) for values in by_seed]) for k in scalars}
    return tables


@dataclass(frozen=True)
class Results:
    """Results of all seeds, for an experiment's figures.

    Attributes:
        settings: settings of the experiment.
        seeds: seeds in order.
        arms: results of the arms, for every seed.
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
