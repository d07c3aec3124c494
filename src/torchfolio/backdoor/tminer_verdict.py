"""What T-Miner says of a classifier, phrase by phrase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchfolio.backdoor.model_detector import ModelVerdict

__all__ = ["Candidate", "TMinerVerdict"]


@dataclass(frozen=True)
class Candidate:
    """A phrase that flips the classifier.

    Attributes:
        phrase: its words.
        pair: source and target class.
        count: number of sentences that the generator added it to; 0 where a likely word stands in for one of those.
        mrs: share of other sentences of the source class that it sends to the target.
        score: distance to the nearest dense place of ordinary phrases, in units of the clustering's radius.
        distance: mean distance to the nearest ordinary phrases over the 99th percentile of theirs.
        outlier: whether it is outside all of them, which makes it a trigger.
    """

    phrase: tuple[str, ...]
    pair: tuple[int, int]
    count: int
    mrs: float
    score: float
    distance: float
    outlier: bool


@dataclass(frozen=True, repr=False)
class TMinerVerdict(ModelVerdict):
    """What T-Miner says of a classifier.

    Attributes:
        candidates: phrases that survived, outliers first, then by how often they came.
        trigger_words: words of the outliers, those that most of them share first.
    """

    candidates: tuple[Candidate, ...] = ()
    trigger_words: tuple[str, ...] = ()

    def sentences(self, classes: Sequence[str] = ()) -> list[str]:
        sentences = super().sentences(classes)
        shown = ", ".join(" ".join(c.phrase) for c in self.candidates[:5])
        if self.is_backdoored:
            words = ", ".join(self.trigger_words[:5])
            return [
                sentences[0],
                f"Words that drive it far from where ordinary words do: {words}. Phrases: {shown}.",
                *sentences[1:],
            ]
        if self.candidates:
            sentences.insert(1, f"Some phrases flip its verdict as ordinary words may: {shown}.")
        else:
            sentences.insert(1, "No short phrase was found that flips its verdict.")
        return sentences
