"""One seed of an experiment: its arms, what it records and draws, the values of its claims."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from torchfolio.runs import expression
from torchfolio.runs.store import (
    BESIDE,
    append_json_line,
    atomic,
    read_json_lines,
    read_result,
    write_json,
    write_json_lines,
    write_result,
)

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import nn

    from torchfolio.catalog import Claim
    from torchfolio.data import DataSplits
    from torchfolio.engine import FitResult

METRICS = "metrics.jsonl"
S = TypeVar("S")
T = TypeVar("T")


@dataclass
class Run(Generic[S]):
    """What an experiment's `run` is given: one seed of it.

    Attributes:
        slug: slug of the paper.
        scale: `"smoke"`, `"quick"` or `"full"`.
        seed: seed of this run; arms of equal seed get equal data, initial weights and order.
        settings: the experiment's settings.
        device: device to compute on.
        folder: folder of this seed.
        claims: claims that the experiment may give values of, by id; any where there are none.
        say: function that is called with a line about what is going on.
    """

    slug: str
    scale: str
    seed: int
    settings: S
    device: torch.device
    folder: Path
    claims: Mapping[str, Claim] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows: list[dict[str, Any]] | None = None  # of the arm under way
        # Every row comes again, from the experiment or from its stored arms.
        (self.folder / METRICS).unlink(missing_ok=True)

    def arm(
        self, name: str, function: Callable[..., Mapping[str, Any]], /, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """One condition of the comparison, computed once.

        Every global generator is seeded with the run's seed first, so that arms are paired and do not depend on
        what ran before. The result is stored when it is complete; a resumed run reads it back.

        Args:
            name: name of the arm.
            function: computes it and returns numbers, text, lists, arrays or tensors by name.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: if there was an arm of this name already.
        """
        if name in self.arms or not name or "/" in name or name.startswith("."):
            raise ValueError(f"expected the name of an arm that is new and can name a file, got {name!r}")
        path = self.folder / "arms" / f"{name}.json"
        if (stored := self._stored(path)) is not None:
            self.say(f"{name}: done before")
            self.arms[name] = stored
            for row in read_json_lines(path.with_suffix(".jsonl")):
                append_json_line(self.folder / METRICS, row)
        else:
            from torchfolio.engine import seeded

            self.say(name)
            start = time.perf_counter()
            self._rows = []
            try:
                with seeded(self.seed):
                    result = function(*args, **kwargs)
                if self._rows:
                    write_json_lines(path.with_suffix(".jsonl"), self._rows)
            finally:
                self._rows = None
            write_json(path.with_suffix(".seconds"), time.perf_counter() - start)
            self.arms[name] = write_result(path, result)
        timed = path.with_suffix(".seconds")
        self.seconds[name] = json.loads(timed.read_text()) if timed.is_file() else 0.0
        return self.arms[name]

    def _stored(self, path: Path) -> dict[str, Any] | None:
        """What an arm gave before; `None` if it did not, or if that is damaged and must be computed again."""
        if not path.is_file():
            return None
        try:
            return read_result(path)
        except ValueError as error:
            warnings.warn(f"{error}; the arm is computed again", stacklevel=3)
            for suffix in BESIDE:
                path.with_suffix(suffix).unlink(missing_ok=True)
            return None

    def record(self, **scalars: Any) -> None:
        """Add a row to `metrics.jsonl`. Rows of an arm are stored with it and come back when the arm does."""
        append_json_line(self.folder / METRICS, scalars)
        if self._rows is not None:
            self._rows.append(scalars)

    def figure(self, name: str, figure: Figure, caption: str = "") -> None:
        """Save a picture of this seed as PNG and SVG, and close it."""
        save_figure(self.folder / "figures", name, figure)
        self.figures[name] = caption

    def values(self, id: str, measured: float | Mapping[str, float] | None = None, /, **named: float) -> None:
        """Give what was measured of a claim; the condition on it stands in the catalogue.

        Args:
            id: id of the claim.
            measured: one value (called `measured`), or values by name.
            **named: further values.

        Raises:
            ValueError: if the claim is unknown or was measured before, or if its condition names a value that is
                missing (which it may at smoke scale, where nothing is judged).
        """
        if self.claims and id not in self.claims:
            raise ValueError(
                f"{self.slug} has no claim {id!r} in the catalogue; its claims are {', '.join(self.claims)}"
            )
        if id in self.measured:
            raise ValueError(f"the claim {id!r} was measured before")
        figures = measured if isinstance(measured, Mapping) else {} if measured is None else {"measured": measured}
        values = {name: float(value) for name, value in {**figures, **named}.items()}
        condition = self.claims[id].holds if id in self.claims else None
        if condition is not None and self.scale != "smoke":
            expression.parse(condition, values)
        self.measured[id] = values

    def data(self, name: str, **arguments: Any) -> DataSplits:
        """A data set with this run's seed; arguments of `torchfolio.data.load`."""
        from torchfolio.data import load

        return load(name, **{"seed": self.seed, **arguments})

    def fit(self, model: nn.Module, data: Any, **arguments: Any) -> FitResult:
        """Train a network with this run's seed, on its device; arguments of `torchfolio.engine.fit`."""
        from torchfolio.engine import fit

        return fit(model, data, **{"seed": self.seed, "device": self.device, **arguments})

    def generator(self) -> torch.Generator:
        """A new generator on the CPU, which begins at this run's seed."""
        import torch

        return torch.Generator().manual_seed(self.seed)

    def progress(self, items: Iterable[T], text: str = "") -> Iterator[T]:
        """Go through items, saying how far it is."""
        items = list(items)
        for k, item in enumerate(items, start=1):
            self.say(f"{text} {k}/{len(items)}".strip())
            yield item


def pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those values of an arm that a claim is about.

    >>> pick({"ratio": 0.25, "difference": 0.0, "seconds": 3.1}, "ratio", "difference")
    {'ratio': 0.25, 'difference': 0.0}
    """
    return {name: values[name] for name in names}


def column(arms: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    """One value of several arms, `[arms, ...]`.

    >>> column([{"loss": 0.5}, {"loss": 0.25}], "loss").max()
    np.float64(0.5)
    """
    return np.array([arm[name] for arm in arms])


def save_figure(folder: Path, name: str, figure: Figure) -> None:
    """Write a figure as PNG and SVG and close it."""
    import matplotlib.pyplot as plt

    stem = name.replace(" ", "_").replace("/", "_")
    for suffix in ("png", "svg"):
        # Names within an SVG are random without a salt.
        with atomic(folder / f"{stem}.{suffix}") as file, plt.rc_context({"svg.hashsalt": "torchfolio"}):
            # Without a date the same figure is the same file.
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(file, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
