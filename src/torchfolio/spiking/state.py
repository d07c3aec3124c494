"""The state that modules carry from one time step to the next, and dropout that lasts a sequence."""

from __future__ import annotations

from torch import Tensor

from torchfolio.models.stateful import Stateful, cut, detach_state, reset_state, state_modules

__all__ = ["SequenceDropout", "Stateful", "cut", "detach_state", "reset_state", "state_modules"]


class SequenceDropout(Stateful):
    """Dropout with one mask for all steps of a sequence.

    A mask drawn anew at every step would average out over time. The mask is drawn at the first step in training
    mode, with kept elements scaled by $1/(1-p)$, and goes with `reset_state`.

    Args:
        p: probability of dropping an element, in [0, 1).

    Shapes:
        Any, unchanged.

    Raises:
        ValueError: if `p` is out of range, or the shape changes within a sequence.
    """

    states = ("mask",)

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"expected p in [0, 1), got {p!r}")
        self.p = p
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.mask is None:
            self.mask = x.new_empty(x.shape).bernoulli_(1 - self.p).div_(1 - self.p)
        self.check(self.mask, x)
        return x * self.mask

    def extra_repr(self) -> str:
        return f"p={self.p}"
