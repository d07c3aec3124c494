"""A progress bar with the time left, on standard error, where somebody looks."""

from __future__ import annotations

import sys
import types
from typing import Any


class Progress:
    """Steps done of all, the loss, and the time left. Silent unless standard error is a terminal.

    Args:
        total: steps in all.
        done: steps done before.
        show: force on or off; `None` decides by the terminal.
    """

    def __init__(self, total: int, done: int = 0, show: bool | None = None) -> None:
        self.total, self.done = total, done
        self.show = sys.stderr.isatty() if show is None else show
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("fit", total=self.total, completed=self.done)
        return self

    def advance(self) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def describe(self, text: str) -> None:
        """Change the text before the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
