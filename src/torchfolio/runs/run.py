"""One seed of an experiment: its arms, what it records, draws and claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torchfolio.runs import expression
from torchfolio.runs.store import append_json_line, atomic, read_result, write_result

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from torchfolio.data import DataSplits

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """A claim as one seed measured it.

    Attributes:
        id: of the claim.
        values: measured values by name.
        expression: the condition on them; `None` where the experiment decided itself.
        holds: whether it holds on this seed.
    """

    id: str
    values: dict[str, float]
    expression: str | None
    holds: bool


@dataclass
class Run(Generic[S]):
    """What an experiment's `run` is given: one seed of it.

    Attributes:
        slug: of the paper.
        scale: `"smoke"`, `"quick"` or `"full"`.
        seed: of this run; arms of equal seed get equal data, initial weights and order.
        settings: the experiment's settings.
        device: where to compute.
        folder: of this seed.
        claim_ids: claims that the catalogue knows.
        say: called with a line about what is going on.
    """

    slug: str
    scale: str
    seed: int
    settings: S
    device: torch.device
    folder: Path
    claim_ids: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda text: None
    measured: dict[str, Measured] = field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)

    def arm(
        self, name: str, function: Callable[..., Mapping[str, Any]], /, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """One condition of the comparison, computed once.

        Every global generator is seeded with the run's seed first, so that arms are paired and do not depend on
        what ran before. The result is stored when it is complete; a resumed run reads it back.

        Args:
            name: of the arm.
            function: computes it and returns numbers, text, lists, arrays or tensors by name.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: if there was an arm of this name already.
        """
        if name in self.arms or not name or "/" in name or name.startswith("."):
            raise ValueError(f"expected the name of an arm that is new and can name a file, got {name!r}")
        path = self.folder / "arms" / f"{name}.json"
        if path.is_file():
            self.say(f"{name}: done before")
            self.arms[name] = read_result(path)
        else:
            from torchfolio.engine import seeded

            self.say(name)
            with seeded(self.seed):
                result = function(*args, **kwargs)
            self.arms[name] = write_result(path, result)
        return self.arms[name]

    def record(self, **scalars: Any) -> None:
        """Add a row to `metrics.jsonl`."""
        append_json_line(self.folder / "metrics.jsonl", scalars)

    def figure(self, name: str, figure: Figure, caption: str = "") -> None:
        """Save a picture of this seed as PNG and SVG, and close it."""
        save_figure(self.folder / "figures", name, figure)
        self.figures[name] = caption

    def claim(self, id: str, measured: float | Mapping[str, float], holds: str | bool) -> bool:
        """State what was measured of a claim, and the condition under which it holds.

        Args:
            id: of the claim in the catalogue.
            measured: one value (called `measured`) or values by name.
            holds: a condition such as `"ours >= baseline - 2"`, which is evaluated on this seed and on the mean over
                seeds; or a truth value, which must be true on every seed.

        Returns:
            Whether it holds on this seed.

        Raises:
            ValueError: if the claim is unknown or was stated before, or the condition cannot be read.
        """
        if self.claim_ids and id not in self.claim_ids:
            raise ValueError(
                f"{self.slug} has no claim {id!r} in the catalogue; its claims are {', '.join(self.claim_ids)}"
            )
        if id in self.measured:
            raise ValueError(f"the claim {id!r} was measured before")
        named = measured.items() if isinstance(measured, Mapping) else [("measured", measured)]
        values = {name: float(value) for name, value in named}
        true = expression.holds(holds, values) if isinstance(holds, str) else bool(holds)
        self.measured[id] = Measured(id, values, holds if isinstance(holds, str) else None, true)
        return true

    def data(self, name: str, **arguments: Any) -> DataSplits:
        """A data set with this run's seed; arguments of `torchfolio.data.load`."""
        from torchfolio.data import load

        return load(name, **{"seed": self.seed, **arguments})

    def progress(self, items: Iterable[T], text: str = "") -> Iterator[T]:
        """Go through items, saying how far it is."""
        items = list(items)
        for k, item in enumerate(items, start=1):
            self.say(f"{text} {k}/{len(items)}".strip())
            yield item


def save_figure(folder: Path, name: str, figure: Figure) -> None:
    """Write a figure as PNG and SVG and close it."""
    import matplotlib.pyplot as plt

    stem = name.replace(" ", "_").replace("/", "_")
    for suffix in ("png", "svg"):
        with atomic(folder / f"{stem}.{suffix}") as file:
            # Without a date the same figure is the same file.
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(file, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
