"""Modules that carry state from one call to the next, and how to clear or cut it.

State is a plain attribute, not a buffer: checkpoints do not hold it and it does not fix the batch size. Whoever runs a
network over several batches resets it between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["Stateful", "cut", "detach_state", "fresh", "reset_state", "state_modules"]


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


def state_modules(module: nn.Module) -> list[nn.Module]:
    """All modules with state, each once; those of other libraries count if they have a state `v` and `reset()`."""
    return [m for m in module.modules() if isinstance(m, Stateful) or _is_foreign(m)]


def _is_foreign(module: nn.Module) -> bool:
    # A layer or weight of that name is no state: its `reset` may well draw new weights.
    state = module.__dict__.get("v", module)
    return isinstance(state, Tensor | float | int | None) and callable(getattr(module, "reset", None))


def reset_state(module: nn.Module) -> None:
    """Forget every state; call it before each new batch of sequences."""
    for part in state_modules(module):
        part.reset()  # pyright: ignore[reportCallIssue]


@contextmanager
def fresh(module: nn.Module) -> Iterator[None]:
    """No state of before inside, and none of inside afterwards."""
    parts = state_modules(module)
    try:
        for part in parts:
            part.reset()  # pyright: ignore[reportCallIssue]
        yield
    finally:
        for part in parts:  # while a network is traced, a state is no tensor and so not known again
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
