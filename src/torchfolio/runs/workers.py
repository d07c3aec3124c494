"""Seeds measured in other processes, of this machine or of a Ray cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import replace
from multiprocessing import parent_process
from multiprocessing.connection import wait

from torchfolio.errors import require
from torchfolio.runs.job import Job, Say
from torchfolio.runs.measuring import measure_seed

__all__ = ["measure_in", "measure_on_ray", "start_worker"]


def start_worker(threads_each: int) -> None:
    """Give a worker its share of the threads, and let it end with the process that started it, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads_each)
    import torch

    torch.set_num_threads(threads_each)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def measure_in(pool: Executor, jobs: Sequence[Job], say: Say) -> None:
    """Compute all arms of all seeds in other processes; `_conclude` then finds them done."""
    waiting = {pool.submit(_measure_quietly, job, seed): (job, seed) for job in jobs for seed in job.seeds}
    for future in as_completed(waiting):
        job, seed = waiting[future]
        error = future.exception() or future.result()
        say(f"{job.slug} seed {seed}: {'done' if error is None else f'failed: {error}'}")


def measure_on_ray(jobs: Sequence[Job], say: Say) -> None:
    """Measure the seeds of all jobs on a Ray cluster, or on one started for them, and close it again."""
    ray = require("ray", "ray")
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        remote = ray.remote(_measure_quietly)
        # A worker's working directory is another one; the folder is one that all machines share.
        whole = [replace(job, folder=job.folder.absolute()) for job in jobs]
        waiting = {remote.remote(job, seed): (job, seed) for job in whole for seed in job.seeds}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job, seed = waiting.pop(ready)
            error = ray.get(ready)
            say(f"{job.slug} seed {seed}: {'done' if error is None else f'failed: {error}'}")
    finally:
        if own:
            ray.shutdown()


def _measure_quietly(job: Job, seed: int) -> str | None:
    """One seed in a worker. The error is met again, with its traceback, when the outcome is put together."""
    try:
        measure_seed(job, seed, lambda text: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
