"""Controls of a feedback path: paths that do not see how wrong the network was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchfolio.training.fast_slow_memory import FastSlowMemoryNetwork, FeedbackPath

__all__ = ["FEEDBACK", "blindfold"]


class BlindFeedback(FeedbackPath):
    """A feedback path that sees neither errors nor labels, nor what was written, which the label goes into."""

    def forward(
        self, activities: Sequence[Tensor], output: Tensor, error: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        *seen, written = activities
        nothing = torch.zeros_like(error)
        return super().forward((*seen, torch.zeros_like(written)), output, nothing, nothing)


class SealedFeedback(BlindFeedback):
    """Blind, and without a signal for the write controller, whose fast weights see labels as their input."""

    def forward(
        self, activities: Sequence[Tensor], output: Tensor, error: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        signals, correction = super().forward(activities, output, error, target)
        ahead, middle, after = signals.split(self.sizes, -1)
        return torch.cat((ahead, middle, torch.zeros_like(after)), -1), correction


FEEDBACK: dict[str, type[FeedbackPath]] = {"blind": BlindFeedback, "sealed": SealedFeedback}


def blindfold(net: FastSlowMemoryNetwork, kind: str) -> None:
    """Put one of `FEEDBACK` in the place of a network's feedback path, with its weights."""
    seeing = net.feedback
    assert seeing is not None
    net.feedback = FEEDBACK[kind](seeing.sizes, net.out_dim)
    net.feedback.load_state_dict(seeing.state_dict())
