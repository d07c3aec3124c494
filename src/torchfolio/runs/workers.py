"""Seeds measured in other processes, of this machine or of a Ray cluster."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from torchfolio.errors import require
from torchfolio.processes import import_ahead, worker_context
from torchfolio.runs.environment import cores
from torchfolio.runs.job import Job, Say
from torchfolio.runs.measuring import Measured, measure_seed

__all__ = ["MeasuredSeeds", "measure_in_processes", "measure_on_ray"]

MeasuredSeeds = dict[tuple[Path, int], Measured]
"""What was measured in other processes, by the folder of the run and the seed; those that failed are not in it."""


def measure_in_processes(jobs: Sequence[Job], processes: int, say: Say) -> MeasuredSeeds:
    """Measure the seeds of all jobs, so many at a time, each process with its share of the threads.

    A worker ends with this process, however that ends, and when this call does not return.
    """
    import_ahead([job.module for job in jobs])
    context = worker_context()
    ours, of_workers = context.Pipe()
    start = (of_workers, max(1, cores() // processes), dict(os.environ))
    measured: MeasuredSeeds = {}
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=start) as pool:
        waiting = {pool.submit(_measure_quietly, job, seed): (job, seed) for job in jobs for seed in job.seeds}
        try:
            for future in as_completed(waiting):
                job, seed = waiting[future]
                _take(measured, job, seed, future.exception() or future.result(), say)
        except BaseException:  # Ctrl-C too: or the pool would wait for all seeds
            ours.close()
            raise
    return measured


def _start_worker(alive: Connection, num_threads: int, environment: dict[str, str]) -> None:
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and silently; what it has stored stays
    gc.freeze()
    gc.enable()
    os.environ.clear()  # that of the server is as old as the server
    os.environ.update(environment, OMP_NUM_THREADS=str(num_threads))  # read by libraries to be loaded
    import torch
    from threadpoolctl import threadpool_limits

    threadpool_limits(num_threads)
    torch.set_num_threads(num_threads)


def _end_with_parent(alive: Connection) -> None:
    wait([alive])  # nothing is ever sent: the other end is closed, by the parent or by its death
    os._exit(1)


def _take(measured: MeasuredSeeds, job: Job, seed: int, result: Measured | str | BaseException, say: Say) -> None:
    if isinstance(result, Measured):
        measured[job.folder, seed] = result
    say(f"{job.slug} seed {seed}: {'done' if isinstance(result, Measured) else f'failed: {result}'}")


def measure_on_ray(jobs: Sequence[Job], say: Say) -> MeasuredSeeds:
    """Measure the seeds of all jobs on a Ray cluster, or on one started for them, and close it again."""
    ray = require("ray", "ray")
    own = not ray.is_initialized()
    measured: MeasuredSeeds = {}
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        remote = ray.remote(_measure_quietly)
        # A worker's working directory is another one; the folder is one that all machines share.
        waiting = {
            remote.remote(replace(job, folder=job.folder.absolute()), seed): (job, seed)
            for job in jobs
            for seed in job.seeds
        }
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job, seed = waiting.pop(ready)
            _take(measured, job, seed, ray.get(ready), say)
    finally:
        if own:
            ray.shutdown()
    return measured


def _measure_quietly(job: Job, seed: int) -> Measured | str:
    """One seed in a worker. The error is met again, with its traceback, when the outcome is put together."""
    try:
        return measure_seed(job, seed, lambda text: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
