"""What a bundle keeps of its training, card by card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfolio.cli._inside import Shown, panel_card
from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch import nn

    from torchfolio.bundle import Manifest
    from torchfolio.data import DataSplits
    from torchfolio.measure import Panel
    from torchfolio.report.sheet import Sheet

SEEN = 500  # training examples that are looked at


SHARP = 128  # examples that the sharpness is taken over


@dataclass(frozen=True)
class Training:
    """What stands in a bundle of its training.

    Attributes:
        folder: folder of the bundle.
        name: name of the network.
        manifest: manifest of the bundle.
        data: name of the data set that is looked at.
        image_size: side of the images that are looked at.
    """

    folder: Path
    name: str
    manifest: Manifest
    data: str
    image_size: int | None

    def trained_on(self, count: int) -> DataSplits | None:
        """The first training examples, not normalised, where the data are those of the training; fewer if it had fewer."""
        from torchfolio.cli._network import fitting_splits

        trained = self.manifest.training
        if trained.get("data") != self.data or self.image_size not in (None, trained.get("image_size")):
            return None
        known = trained.get("examples")
        count = min(count, known) if isinstance(known, int) and known > 0 else count
        try:
            return fitting_splits(self.manifest, str(self.folder), self.data, seed=trained.get("seed", 0),
                                  train_size=count, test_size=1)  # fmt: skip
        except (TorchfolioError, ValueError, TypeError):
            return None

    def followed(self, targets: Sequence[float]) -> DataSplits | None:
        """The examples that were followed, where they are the first ones that were trained on."""
        splits = self.trained_on(len(targets))
        if splits is None:
            return None
        y = splits.train.tensors[1].double().reshape(len(splits.train), -1)[:, 0]
        return splits if y.tolist() == list(targets) else None


def training_cards(training: Training, net: nn.Module, shown: Shown) -> tuple[list[Sheet], dict[str, Any]]:
    """How the training went: loss, sharpness against the step size, and the examples that moved it.

    Where the bundle keeps none of it, the cards say what cannot be told.
    """
    from torchfolio.cli._training import read_record
    from torchfolio.insight.training_panels import group_panel, sharpness_panel
    from torchfolio.report.learning import learning_card

    facts, record = training.manifest.training, read_record(training.folder)
    cards: dict[str, tuple[Sheet | None, dict[str, Any]]] = {}
    cards["history"] = learning_card(training.folder, training.name), {}
    if cards["history"][0] is None:
        told = "How it was trained, epoch by epoch, cannot be told: the bundle holds no history.csv."
        cards["history"] = None, {"not_shown": told}
    last = math.nan if record is not None else _last_sharpness(net, shown.splits)
    cards["sharpness"] = panel_card("its sharpness", lambda: sharpness_panel(record, facts, last))
    if record is not None:
        followed = training.followed(record.targets)
        seen = replace(shown, splits=followed).as_people_see(followed.train.tensors[0]) if followed is not None else {}
        card, record_of_groups = panel_card("groups", lambda: group_panel(record, shown.classes, **seen))
        if followed is None and card is not None:
            card = replace(card, notes=[*card.notes, "The examples themselves are not shown: the data are not those it was trained on."])  # fmt: skip
        cards["groups"] = card, record_of_groups
    return [card for card, _ in cards.values() if card], {
        name: record_of_groups for name, (_, record_of_groups) in cards.items()
    }


def _last_sharpness(net: nn.Module, splits: DataSplits) -> float:
    """Sharpness of the trained network over some training examples."""
    from torchfolio.insight.training_record import sharpness_of

    place = next((p.device for p in net.parameters()), None)
    x, y = (t[:SHARP].to(place) for t in splits.train.tensors)
    return sharpness_of(net, x, y)[0]


def size_card(training: Training, net: nn.Module, shown: Shown) -> tuple[Sheet | None, dict[str, Any]]:
    """Whether the size may sit at a peak of the test error."""
    from torchfolio.insight.size_panel import size_panel

    facts = training.manifest.training
    count = facts.get("examples")

    def look() -> Panel:
        splits = training.trained_on(SEEN)
        if splits is None:
            raise ValueError("Whether its size sits at a peak of the test error is not shown: the data are not those it was trained on.")  # fmt: skip
        seen = shown.normalized(splits, training.manifest)
        x, y = shown.examples.first(len(shown.examples))
        return size_panel(net, seen, (x, y), count if isinstance(count, int) else None)

    return panel_card("its size", look)
