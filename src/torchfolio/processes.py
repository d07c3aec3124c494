"""Worker processes whose imports are done when they begin.

A fresh interpreter imports torch for a second or two, and a fork of a process that has computed inherits threads that
hang it. So workers are forked from a server of `multiprocessing` that has imported their modules and done nothing else
(the thread pools that imports start, of OpenBLAS and Arrow, look after forks of their own). Its imports run beside
those of the process that starts it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.context import BaseContext

__all__ = ["import_ahead", "worker_context"]

FORKS = sys.platform == "linux"
"""Whether workers are forked. The system libraries of macOS do not outlive a fork, and Windows has none."""


def import_ahead(modules: Sequence[str]) -> None:
    """Begin to import modules for the workers to come; without effect where there was a beginning."""
    if not FORKS:
        return
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(["torchfolio.undisturbed", *modules])
    forkserver.ensure_running()


def worker_context(*, fork: bool = True) -> BaseContext:
    """How worker processes are made.

    Args:
        fork: whether they may be forked; those that will use an accelerator may not.
    """
    return get_context("forkserver" if FORKS and fork else "spawn")
