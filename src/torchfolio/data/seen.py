"""Which examples a network was trained on, kept in few bytes, so that they are known again under any name.

Every example has a mark, a hash of its content. Of the marks of a training the smallest are kept: a sample of its examples
that is the same whatever their order, and from whose largest mark one sees which marks of another set would stand in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

KEPT = 256  # marks
LOOKED_AT = 256  # numbers of an example, evenly spaced
BYTES = 7  # of a mark: it is an int64 that is not negative


def marks_of(x: Tensor, rows: Tensor) -> Tensor:
    """The marks of some rows of what was read, int64 `[N]`."""
    shape = x.shape[1:]
    places = torch.linspace(0, shape.numel() - 1, min(shape.numel(), LOOKED_AT), dtype=torch.float64).long()
    axes = torch.unravel_index(places, shape) if len(shape) else ()
    values = x[(rows[:, None], *axes)].numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=BYTES).digest() for row in values)
    return torch.tensor([int.from_bytes(digest) for digest in digests], dtype=torch.int64)


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
