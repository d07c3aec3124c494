"""Seconds of several callables, timed in turn."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.utils.benchmark import timer

from torchfolio.measure.flops import _names

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


@dataclass(frozen=True)
class Alternation:
    """Seconds of several callables that ran in turn.

    Attributes:
        seconds: seconds of one call in each round, by name.
    """

    seconds: Mapping[str, Sequence[float]]

    @property
    def reference(self) -> str:
        """The first callable, which ratios are relative to."""
        return next(iter(self.seconds))

    def ratio(self, name: str) -> float:
        """Median over rounds of this callable's time over the reference's in the same round."""
        return float(median(self.ratios(name)))

    def spread(self, name: str) -> tuple[float, float]:
        """Quartiles of the ratios over rounds."""
        low, high = np.quantile(self.ratios(name), [0.25, 0.75])
        return float(low), float(high)

    def ratios(self, name: str) -> list[float]:
        """The ratio of every round: pairing takes out what slowed the machine in that round."""
        if name not in self.seconds:
            raise KeyError(f"expected one of {', '.join(self.seconds)}, got {name!r}")
        return [a / b for a, b in zip(self.seconds[name], self.seconds[self.reference], strict=True)]

    def to_frame(self) -> pd.DataFrame:
        """Median seconds, ratio to the reference and its quartiles, a row for each callable."""
        import pandas as pd

        rows = [
            {
                "name": n,
                "seconds": median(s),
                "ratio": self.ratio(n),
                "low": self.spread(n)[0],
                "high": self.spread(n)[1],
            }
            for n, s in self.seconds.items()
        ]
        return pd.DataFrame(rows).set_index("name")

    def __str__(self) -> str:
        return self.to_frame().to_string(float_format="%.4g")


def timed(function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, float]:
    """What one call returns, and its seconds; `alternate` compares several calls fairly.

    >>> total, seconds = timed(sum, [1, 2])
    >>> total, seconds < 60
    (3, True)
    """
    start = timer()
    result = function(*args, **kwargs)
    return result, timer() - start


def alternate(
    *callables: Callable[[], object],
    repeats: int = 9,
    warmup: int = 1,
    min_seconds: float = 1e-3,
    **named: Callable[[], object],
) -> Alternation:
    """Time callables in turn, so that whatever else the machine does falls on all of them alike.

    The clock waits for the accelerator where there is one, the garbage collector is off, and each round
    begins with another callable.

    Args:
        *callables: named after their `__name__`, or numbered where that is taken or missing.
        repeats: rounds; each times every callable once.
        warmup: untimed calls of each first; at least one is made, to see how fast it is.
        min_seconds: a callable faster than this is called so many times in a row that a timing takes as long.
        **named: further callables by name. The first of all is the reference.

    Returns:
        The seconds of one call, per callable and round.

    Raises:
        ValueError: if there are fewer than two callables or no rounds.

    Example:
        >>> print(alternate(plain=step, compiled=compiled_step))  # doctest: +SKIP
    """
    candidates = _names(callables) | named
    if len(candidates) < 2:
        raise ValueError(f"expected at least two callables, got {len(candidates)}")
    if repeats < 1:
        raise ValueError(f"expected at least one round, got {repeats}")
    calls = {name: _calls(call, warmup, min_seconds) for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    with _no_collection():
        for round_ in range(repeats):
            turn = round_ % len(order)
            for name in order[turn:] + order[:turn]:
                seconds[name].append(_time(candidates[name], calls[name]))
    return Alternation(seconds)


def _calls(call: Callable[[], object], warmup: int, min_seconds: float) -> int:
    """How many calls make a timing of `min_seconds`, by the fastest of the warm-up calls."""
    fastest = min(_time(call, 1) for _ in range(max(warmup, 1)))
    return max(1, math.ceil(min_seconds / max(fastest, 1e-9)))


def _time(call: Callable[[], object], calls: int) -> float:
    start = timer()
    for _ in range(calls):
        call()
    return (timer() - start) / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
