"""The machine and the versions that a run was made with, and how many threads it uses."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchfolio import __version__


def environment(device: str) -> dict[str, Any]:
    """Versions, platform, processor, threads and device."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {
        "torchfolio": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": name,
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute with `n` threads for a while; tiny matrices run far faster with one."""
    import torch
    from threadpoolctl import threadpool_limits

    if n < 1:
        raise ValueError(f"expected at least one thread, got {n}")
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with threadpool_limits(n):
            yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
