"""Leaving in good order when asked to."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible(active: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step is finished and a checkpoint written before leaving.

    A second SIGINT does not wait. Outside the main thread, where Python takes no signals, nothing is
    collected.

    Args:
        active: whether to collect at all.

    Yields:
        The signals received so far.
    """
    received: list[int] = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            # A handler that Python did not install cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def leave(flags: Sequence[bool]) -> None:
    """End the process's work as the signals would have, given which of `SIGNALS` came.

    Raises:
        KeyboardInterrupt: after SIGINT.
        SystemExit: after SIGTERM, with the code 143 that shells give.
    """
    if flags[0]:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal.SIGTERM)
