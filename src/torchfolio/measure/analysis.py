"""What `torchfolio inspect` shows of a network: analyses of the methods, each a panel with words, tables and pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from torchfolio.data.examples import Examples
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Analysis", "Panel"]


@dataclass(frozen=True, repr=False)
class Panel(Shown):
    """One answer about a network, ready to be shown.

    Attributes:
        title: a question or a statement in plain words.
        sentences: sentences on what the figures mean, and when they mean nothing.
        notes: sentences on what to be careful about: saturated estimates, too few examples, what was left out.
        tables: figures in rows.
        pictures: figures with a caption each; none where a picture would say nothing.
        record: figures for programs, as JSON holds them.
        eyebrow: small text above the title: the method and the number of examples.
    """

    title: str
    sentences: Sequence[str]
    notes: Sequence[str] = ()
    tables: Sequence[pd.DataFrame] = ()
    pictures: Sequence[tuple[Figure, str]] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    eyebrow: str = ""


class Analysis(Shown, ABC):
    """A look inside a trained network. Settings are the keyword arguments of its class.

    A method says in the catalogue which class it offers (`[offers] analysis = "..."`), and `torchfolio inspect` shows
    its panel.
    """

    networks: int = 1
    """How many networks it takes: 1, or 2 for a comparison."""

    classes: Sequence[str] = ()
    """Names of the labels, for words and pictures; numbers stand for them where there are none."""

    by_default: bool = True
    """Whether `inspect` shows it unasked: it takes seconds, and says something about any network."""

    def named(self, label: int) -> str:
        """The name of a label."""
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)

    @abstractmethod
    def look(self, *models: nn.Module, data: Examples, layers: Sequence[str] = (), seed: int = 0) -> Panel:
        """Measure a network, or two, which are left as they were.

        Args:
            *models: networks, as many as `networks`, in evaluation mode.
            data: examples that they were not trained on, normalised as they take them.
            layers: names of the layers to look at; the analysis chooses by default.
            seed: seed of random choices.

        Raises:
            ValueError: if the network or the data are not of a kind that it can say something about, in a sentence
                that the page shows in place of the panel.
        """
