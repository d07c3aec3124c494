"""Seeds measured in other processes, of this machine or of a Ray cluster."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from torchfolio.errors import require
from torchfolio.processes import import_ahead, worker_context
from torchfolio.runs.environment import cores
from torchfolio.runs.job import Job
from torchfolio.runs.measuring import Measured, draw_off_screen, measure_seed

__all__ = ["Take", "measure_in_processes", "measure_on_ray"]

Take = Callable[[Job, int, Measured | str | BaseException], None]
"""What is called with a job, a seed, and what was measured or why it was not."""


def measure_in_processes(jobs: Sequence[Job], processes: int, take: Take) -> None:
    """Measure the seeds of all jobs, so many at a time, each process with its share of the threads.

    A worker ends with this process, however that ends, and when this call does not return.
    """
    from torchfolio.engine.devices import resolve_device

    if fork := all(resolve_device(job.device).type == "cpu" for job in jobs):
        import_ahead([job.module for job in jobs])
    context = worker_context(fork=fork)
    ours, of_workers = context.Pipe()
    start = (of_workers, max(1, cores() // processes), dict(os.environ))
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=start) as pool:
        waiting = {pool.submit(_measure_quietly, job, seed): (job, seed) for job in jobs for seed in job.seeds}
        try:
            import matplotlib.pyplot  # noqa: F401 (by the time that there is something to draw it is there)

            for future in as_completed(waiting):
                take(*waiting[future], future.exception() or future.result())
        except BaseException:  # Ctrl-C too: or the pool would wait for all seeds
            ours.close()
            raise


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


def measure_on_ray(jobs: Sequence[Job], take: Take) -> None:
    """Measure the seeds of all jobs on a Ray cluster, or on one started for them, and close it again."""
    from torchfolio.engine.devices import resolve_device

    ray = require("ray", "ray")
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        waiting: dict[Any, tuple[Job, int]] = {}
        for job in jobs:
            device = resolve_device(job.device)
            # Ray hides the GPUs that a task does not ask for.
            remote = ray.remote(num_cpus=1, num_gpus=int(device.type == "cuda"))(_measure_quietly)
            # A worker's working directory is another one; the folder is one that all machines share.
            sent = replace(job, folder=job.folder.absolute(), device=str(device))
            waiting |= {remote.remote(sent, seed): (job, seed) for seed in job.seeds}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayError as error:  # its worker died again and again
                result = error
            take(*waiting.pop(ready), result)
    finally:
        if own:
            ray.shutdown()


def _measure_quietly(job: Job, seed: int) -> Measured | str:
    """One seed in a worker. The error is met again, with its traceback, when the outcome is put together."""
    draw_off_screen()
    try:
        return measure_seed(job, seed, lambda text: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
