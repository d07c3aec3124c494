"""A progress bar with the time left, on standard error, where somebody looks."""

from __future__ import annotations

import sys
import types
from typing import Any


class Progress:
    """Steps done of all, the loss, and the time left. Silent unless standard error is a terminal.

    Args:
        total: steps in all, where that is known.
        done: steps done before.
        show: force on or off; `None` decides by the terminal.
    """

    def __init__(self, total: int | None, done: int = 0, show: bool | None = None) -> None:
        self.total, self.done = total, done
        self.show = sys.stderr.isatty() if show is None else show
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self.show:
            return self
        from rich import progress
        from rich.console import Console
        from rich.errors import LiveError

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        try:
            bar.start()
        except LiveError:  # another display holds the terminal
            return self
        self._bar = bar
        self._task = bar.add_task("", total=self.total, completed=self.done)
        return self

    def update(self, step: int, description: str) -> None:
        """Say how far it is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=description)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
