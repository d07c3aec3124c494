"""A classifier that answers where its prediction is certified, and asks a fallback elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchfolio.data import Examples
from torchfolio.measure import outputs
from torchfolio.robustness.certifier_base import Certifier
from torchfolio.shown import Shown

__all__ = ["AbstainingClassifier", "Decision"]


@dataclass(frozen=True, repr=False)
class Decision(Shown):
    """Answers of a system with a fallback.

    Attributes:
        labels: answer to each input `[B]`, -1 where the system abstained and there is no fallback.
        abstained: mask of the inputs for which the certifier gave no certificate, and the fallback was asked `[B]`.
    """

    labels: Tensor
    abstained: Tensor


class AbstainingClassifier(Shown):
    """A classifier that answers where its prediction is certified, and asks a fallback elsewhere.

    Args:
        certifier: certifier of its network.
        fallback: function that is asked otherwise, from inputs `[B, ...]` to labels `[B]` or logits `[B, K]`: a slower
            network, a queue for people; `None` leaves those inputs unanswered.
    """

    def __init__(self, certifier: Certifier, fallback: Callable[[Tensor], Tensor] | None = None) -> None:
        self.certifier, self.fallback = certifier, fallback

    def __call__(self, x: Tensor) -> Decision:
        """Answers to inputs `[B, ...]`; the fallback sees only those it is asked about."""
        certificate = self.certifier.certify(x)
        labels, abstained = certificate.prediction.clone(), ~certificate.certified
        labels[abstained] = -1
        if self.fallback is not None and bool(abstained.any()):
            answers = self._asked(x[abstained.to(x.device)])
            labels[abstained] = answers.to(labels)
        return Decision(labels, abstained)

    def _asked(self, x: Tensor) -> Tensor:
        answers = outputs(self.fallback, (x,)) if isinstance(self.fallback, nn.Module) else self.fallback(x)  # pyright: ignore[reportOptionalCall]
        answers = answers.argmax(1) if answers.dim() == 2 else answers
        if answers.shape != (len(x),):
            raise ValueError(
                f"expected a label from the fallback for each of {len(x)} inputs, got {tuple(answers.shape)}"
            )
        return answers

    def load(self, data: Any) -> float:
        """Share of the examples that the fallback would be asked about."""
        asked, count = 0, 0
        for row in Examples(data).batches(self.certifier.batch_size):
            asked += int((~self.certifier.certify(row[0]).certified).sum())
            count += len(row[0])
        return asked / count
