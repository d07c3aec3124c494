"""The state that modules carry from one time step to the next, and how to clear or cut it.

State is a plain attribute, not a buffer: checkpoints do not hold it and it does not fix the batch size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["SequenceDropout", "Stateful", "detach_state", "reset_state", "state_modules"]


class Stateful(nn.Module):
    """A module with state between the steps of a sequence, `None` before the first one.

    Subclasses name the attributes in `states`. Copies and pickles start without state: a graph cannot be copied.
    """

    states: tuple[str, ...] = ()

    def reset(self) -> None:
        """Forget the sequence."""
        for name in self.states:
            setattr(self, name, None)

    def detach(self) -> None:
        """Keep the values and cut the graph."""
        for name in self.states:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.detach())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(self.states)}

    def check(self, state: Tensor, x: Tensor) -> None:
        """Refuse an input that does not continue the sequence.

        Raises:
            ValueError: if the shapes differ.
        """
        if state.shape == x.shape:
            return
        kind = type(self).__name__
        if state.shape[1:] == x.shape[1:]:
            got = f"{kind} state has batch {len(state)}, input has batch {len(x)}"
        else:
            got = f"{kind} state has shape {tuple(state.shape)}, input has shape {tuple(x.shape)}"
        raise ValueError(f"{got}: call reset_state(model) between sequences")


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


def state_modules(module: nn.Module) -> list[nn.Module]:
    """All modules with state, each once; those of other libraries count if they have `v` and `reset()`."""
    return [m for m in module.modules() if isinstance(m, Stateful) or _is_foreign(m)]


def _is_foreign(module: nn.Module) -> bool:
    return hasattr(module, "v") and callable(getattr(module, "reset", None))


def reset_state(module: nn.Module) -> None:
    """Forget every state; call it before each new batch of sequences."""
    for part in state_modules(module):
        part.reset()  # pyright: ignore[reportCallIssue]


def detach_state(module: nn.Module) -> None:
    """Keep the values of every state and cut their graph."""
    for part in state_modules(module):
        cut(part)


def cut(part: nn.Module) -> None:
    """Cut the graph of one module's state."""
    own = getattr(part, "detach", None)
    if callable(own):
        own()
    elif isinstance(part.v, Tensor):
        part.v = part.v.detach()
