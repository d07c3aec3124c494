"""What `inspect` shows of a network, card by card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchfolio.bundle import Manifest
    from torchfolio.data import DataSplits, Examples
    from torchfolio.measure import Panel
    from torchfolio.report.sheet import Sheet

MOST_LAYERS = 12


@dataclass(frozen=True)
class Shown:
    """The examples that are looked at, and how they are shown to people.

    Attributes:
        splits: splits of the data, for pictures and texts.
        examples: (x, y), as the network takes them.
        classes: names of the labels.
    """

    splits: DataSplits
    examples: Examples
    classes: tuple[str, ...]

    def normalized(self, splits: DataSplits, manifest: Manifest) -> tuple[Tensor, Tensor]:
        """Training examples as the network takes them."""
        from torchfolio.cli._network import normalized

        x, y = normalized(splits.train, manifest.mean, manifest.std).tensors
        return x, y

    def as_people_see(self, x: Tensor) -> dict[str, Any]:
        """Inputs as pictures or as texts, for `example_losses` and `group_panel`; neither for rows of numbers."""
        if self.splits.vocabulary:
            return {"texts": [self.splits.text(row) for row in x]}
        return {"pictures": self.splits.denormalize(x)} if x.dim() == 4 else {}


def panel_card(slug: str, look: Callable[[], Panel]) -> tuple[Sheet | None, dict[str, Any]]:
    """The card of one analysis; no card where it has nothing to say of this network, and why."""
    from torchfolio.report.sheet import Picture, Sheet, Table

    try:
        panel = look()
    except ValueError as error:
        return None, {"not_shown": str(error)}
    card = Sheet(
        panel.title,
        panel.eyebrow or slug,
        sentences=panel.sentences,
        notes=panel.notes,
        tables=[Table.of(table) for table in panel.tables],
        pictures=[Picture(figure, caption) for figure, caption in panel.pictures],
    )
    return card, dict(panel.record)


def missing_card(records: Mapping[str, Mapping[str, Any]]) -> list[Sheet]:
    """A card with what could not be told, and why; none where all could."""
    from torchfolio.report.sheet import Sheet

    reasons = [str(record["not_shown"]) for record in records.values() if "not_shown" in record]
    return [Sheet("What could not be told", sentences=reasons)] if reasons else []


def losses_card(net: nn.Module, shown: Shown) -> tuple[Sheet | None, dict[str, Any]]:
    """Losses of the examples, and those with the largest."""
    from torchfolio.insight.example_losses import example_losses

    seen = shown.as_people_see(shown.examples.batches(None).__next__()[0])
    return panel_card("losses of examples", lambda: example_losses(net, shown.examples, shown.classes, **seen))


def top_layers(net: nn.Module, x: Tensor) -> list[str]:
    """Layers at the top of a network, a dozen of them at most, whose outputs hold units."""
    from torchfolio.models import collect_features

    names = [name for name, _ in net.named_children()]
    while len(names) == 1:  # a network inside another
        inner = net.get_submodule(names[0])
        below = [f"{names[0]}.{n}" for n, _ in inner.named_children()]
        if not below:
            break
        names = below
    known = []
    for name in names:
        try:
            output = collect_features(net, x, [name], flatten=False)[name]
        except (ValueError, KeyError, TypeError, RuntimeError):
            continue  # not run, run more than once, or without a tensor to show
        if (
            output.dim() >= 2 and len(output) == len(x) and output.is_floating_point()
        ):  # not positions, which are no examples
            known.append(name)
    if not known:
        raise TorchfolioError("no layer at the top of the network gives a tensor of units; name some with --layer")
    step = math.ceil(len(known) / MOST_LAYERS)
    return [*known[:-1][::step], known[-1]]
