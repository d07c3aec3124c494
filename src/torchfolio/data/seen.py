"""Which examples a network was trained on, kept in few bytes, so that they are known again under any name.

Every example has a mark, a hash of its content. Of the marks of a training the smallest are kept: a sample of its examples
that is the same whatever their order, and from whose largest mark one sees which marks of another set would stand in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT = 256  # marks
LOOKED_AT = 256  # numbers of an example, evenly spaced
BYTES = 7  # of a mark: it is an int64 that is not negative


def marks_of(x: Tensor, rows: Tensor) -> Tensor:
    """The marks of some rows of what was read, int64 `[N]`."""
    size = x.shape[1:].numel()
    places = torch.linspace(0, size - 1, min(size, LOOKED_AT), dtype=torch.float64).long()
    marks = []
    for chosen in rows.split(1024):
        values = x.index_select(0, chosen).flatten(1) if x.dim() > 1 else x[chosen, None]
        values = values.index_select(1, places).numpy()
        step, content = values.itemsize * values.shape[1], values.tobytes()
        pieces = (content[k : k + step] for k in range(0, len(content), step))
        marks += [int.from_bytes(hashlib.blake2b(piece, digest_size=BYTES).digest()) for piece in pieces]
    return torch.tensor(marks, dtype=torch.int64)


class Marks(Sequence[Tensor]):
    """The marks of several parts of a set, which are read when they are asked for.

    Args:
        sources: record of what was read, and the rows of it, of every part.
    """

    def __init__(self, sources: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._sources = tuple(sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(marks_of(*source) for source in self._sources[index])
        return marks_of(*self._sources[index])

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)


def sketch(marks: Iterable[int]) -> str:
    """The smallest marks of a training, as text."""
    return "".join(f"{mark:0{2 * BYTES}x}" for mark in sorted(set(marks))[:KEPT])


def is_sketch(text: str) -> bool:
    """Whether a text is one that `sketch` gives."""
    return len(text) % (2 * BYTES) == 0 and not set(text) - set("0123456789abcdef")


def kept_in(text: str) -> list[int]:
    """The marks of a sketch."""
    return [int(text[k : k + 2 * BYTES], 16) for k in range(0, len(text), 2 * BYTES)]


def are_seen(text: str, marks: Tensor) -> bool:
    """Whether examples with these marks are of the training that a sketch was made of, a twentieth or more.

    Two sets share a few by chance, or by their publisher's mistake.
    """
    known = set(kept_in(text))
    bound = max(known) if len(known) >= KEPT else 2 ** (8 * BYTES)
    comparable = [mark for mark in marks.tolist() if mark <= bound]
    seen = sum(mark in known for mark in comparable)
    return seen > 1 and 20 * seen >= len(comparable)
