"""Running experiments: seeds, processes, resuming, outcomes."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

from torchfolio import catalog
from torchfolio.bundle import resolve
from torchfolio.catalog import Claim
from torchfolio.engine.lock import exclusive
from torchfolio.errors import TorchfolioError, require
from torchfolio.models import spec
from torchfolio.runs.environment import cores, environment
from torchfolio.runs.outcome import Outcome, Results, aggregate_arms, aggregate_claims
from torchfolio.runs.run import Run, save_figure
from torchfolio.runs.settings import override
from torchfolio.runs.store import clear_scratch, write_json

SCALES = ("smoke", "quick", "full")
"""Names of the scales, from seconds to the strongest evidence."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One experiment as it was asked for; it can be sent to another process.

    Attributes:
        slug: slug of the paper.
        module: import path of the experiment.
        scale: `"smoke"`, `"quick"` or `"full"`.
        seeds: all seeds.
        settings: changes to the scale's settings.
        device: `"auto"`, `"cpu"`, `"cuda"`.
        folder: folder of the run.
    """

    slug: str
    module: str
    scale: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    device: str
    folder: Path


def experiment(slug: str) -> ModuleType:
    """The module that measures a paper's claims.

    Raises:
        TorchfolioError: if the paper is unknown or its method is not in yet.
    """
    paper = catalog.paper(slug)
    if not paper.is_in:
        raise TorchfolioError(f"{slug} is in the catalogue but its method is not in yet; see: torchfolio list --in")
    return importlib.import_module(f"torchfolio.experiments.{slug}")


def claims_of(slug: str, module: ModuleType) -> tuple[Claim, ...]:
    """The claims of an experiment: of its paper, or of its own table `CLAIMS` from ids to conditions."""
    known = catalog.papers().get(slug)
    if known is not None:
        return known.claims
    return tuple(Claim(id, id, "", holds) for id, holds in getattr(module, "CLAIMS", {}).items())


def run_experiment(
    slug: str | ModuleType,
    scale: str = "quick",
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    *,
    device: str = "auto",
    out: str | Path = "runs",
    resume: bool = False,
    jobs: int = 1,
    say: Say = lambda text: None,
) -> Outcome:
    """Measure the claims of one paper.

    Args:
        slug: slug of the paper, or an experiment's module.
        scale: `"smoke"` (seconds, toy data), `"quick"` (minutes) or `"full"`.
        seeds: one run each; claims are decided on the means over them.
        settings: changes to the experiment's settings.
        device: device to compute on.
        out: folder of run folders.
        resume: go on with the latest unfinished run of the same slug, scale, seeds and settings.
        jobs: seeds at a time, each in a process.
        say: called with lines about what is going on.

    Returns:
        The outcome; a failure of the experiment is in it, not raised.

    Raises:
        TorchfolioError: if there is no such experiment or scale.
        ValueError: on settings that it does not have, or if another process is at the run to be resumed.
    """
    return run_all([plan(slug, scale, seeds, settings, device=device, out=out, resume=resume)], jobs=jobs, say=say)[0]


def plan(
    slug: str | ModuleType,
    scale: str,
    seeds: Sequence[int],
    settings: Mapping[str, Any] | None = None,
    *,
    device: str = "auto",
    out: str | Path = "runs",
    resume: bool = False,
) -> Job:
    """Check what was asked for and make the folder of the run. See `run_experiment`."""
    module = experiment(slug) if isinstance(slug, str) else slug
    slug = slug if isinstance(slug, str) else slug.__name__.rpartition(".")[2]
    if scale not in module.SCALES:
        raise TorchfolioError(f"{slug} has the scales {', '.join(module.SCALES)}, got {scale!r}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"expected seeds that differ, at least one, got {list(seeds)}")
    changes = dict(settings or {})
    chosen = asdict(override(module.SCALES[scale], changes))
    if chosen.get("model") is not None:  # a user's network: told now, not after the data have been read
        resolve(chosen["model"] if ":" in chosen["model"] else spec(chosen["model"]), allow=[chosen["model"]])
    config = {
        "slug": slug,
        "scale": scale,
        "seeds": list(seeds),
        "settings": chosen,
        "changes": changes,
        "device": device,
    }
    folder = _find_unfinished(Path(out) / slug, config) if resume else None
    if folder is None:
        folder = _new_folder(Path(out) / slug, scale)
        write_json(folder / "config.json", config)
    return Job(slug, module.__name__, scale, tuple(seeds), changes, device, folder)


def _new_folder(parent: Path, scale: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{k}" for k in range(1, 1000))):
        folder = parent / f"{scale}-{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{parent} holds a thousand runs of this second")


def _find_unfinished(parent: Path, config: dict[str, Any]) -> Path | None:
    """The latest run of the same configuration whose outcome is not `done`."""
    expected = json.loads(json.dumps({k: v for k, v in config.items() if k != "changes"}))
    for folder in sorted(parent.glob(f"{config['scale']}-*"), reverse=True):
        try:
            stored = json.loads((folder / "config.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if {k: v for k, v in stored.items() if k != "changes"} != expected:
            continue
        outcome = folder / "outcome.json"
        if not outcome.is_file() or Outcome.load(folder).status != "done":
            return folder
    return None


def run_all(
    jobs_to_run: Sequence[Job], *, jobs: int = 1, ray: bool = False, say: Say = lambda text: None
) -> list[Outcome]:
    """Run experiments; a failing one does not stop the others.

    Args:
        jobs_to_run: jobs, see `plan`.
        jobs: seeds at a time, each in a process of its own with its share of the threads.
        ray: spread the seeds over a Ray cluster (the local machine if there is none).
        say: called with lines about what is going on.

    Raises:
        FolderInUse: if another process is at one of them.
    """
    if jobs < 1:
        raise ValueError(f"expected at least one job, got {jobs}")
    with ExitStack() as stack:
        for job in jobs_to_run:
            stack.enter_context(exclusive(job.folder))
            clear_scratch(job.folder)
        if ray:
            _measure_on_ray(jobs_to_run, say)
        elif jobs > 1:
            threads_each = max(1, cores() // jobs)
            # A fresh interpreter for each worker: forking one that has run threads of its own can hang.
            with ProcessPoolExecutor(
                jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(threads_each,)
            ) as pool:
                _measure_in(pool, jobs_to_run, say)
        return [_conclude(job, say) for job in jobs_to_run]


def _start_worker(threads_each: int) -> None:
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


def _measure_in(pool: Executor, jobs: Sequence[Job], say: Say) -> None:
    """Compute all arms of all seeds in other processes; `_conclude` then finds them done."""
    waiting = {pool.submit(_measure_quietly, job, seed): (job, seed) for job in jobs for seed in job.seeds}
    for future in as_completed(waiting):
        job, seed = waiting[future]
        error = future.exception() or future.result()
        say(f"{job.slug} seed {seed}: {'done' if error is None else f'failed: {error}'}")


def _measure_on_ray(jobs: Sequence[Job], say: Say) -> None:
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
        _measure(job, seed, lambda text: None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _measure(job: Job, seed: int, say: Say) -> Run[Any]:
    """Run one seed; arms that are stored are not computed again."""
    import matplotlib

    matplotlib.use("agg")
    from torchfolio.engine.devices import resolve_device

    module = importlib.import_module(job.module)
    run: Run[Any] = Run(
        slug=job.slug,
        scale=job.scale,
        seed=seed,
        settings=override(module.SCALES[job.scale], job.settings),
        device=resolve_device(job.device),
        folder=job.folder / f"seed-{seed}",
        claims={claim.id: claim for claim in claims_of(job.slug, module)},
        say=lambda text: say(f"{job.slug} seed {seed}: {text}"),
    )
    module.run(run)
    return run


def _conclude(job: Job, say: Say) -> Outcome:
    """Run what is left of the seeds, put the outcome together and write it."""
    from torchfolio.engine.devices import resolve_device

    module = importlib.import_module(job.module)
    settings = override(module.SCALES[job.scale], job.settings)
    outcome = Outcome(
        slug=job.slug,
        scale=job.scale,
        status="interrupted",
        seeds=list(job.seeds),
        settings=json.loads(json.dumps(asdict(settings))),
        command=command(job),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        environment=environment(str(resolve_device(job.device))),
    )
    write_json(job.folder / "environment.json", outcome.environment)
    runs: list[Run[Any]] = []
    try:
        for seed in job.seeds:
            runs.append(_measure(job, seed, say))
        outcome.figures = _figures(module, settings, job, runs)
        outcome.status = "done"
    except Exception as error:
        outcome.status = "failed"
        outcome.error = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        say(f"{job.slug}: failed: {type(error).__name__}: {error}")
    finally:
        complete = runs if outcome.status == "done" else []
        claims = claims_of(job.slug, module)
        outcome.claims = aggregate_claims(claims, [r.measured for r in complete], judge=job.scale != "smoke")
        outcome.arms = aggregate_arms([r.arms for r in complete])
        outcome.seconds = round(sum(sum(run.seconds.values()) for run in runs), 2)
        outcome.save(job.folder)
    return outcome


def _figures(module: ModuleType, settings: Any, job: Job, runs: Sequence[Run[Any]]) -> list[dict[str, str]]:
    """Pictures over all seeds, then those of single seeds."""
    figures = []
    if hasattr(module, "figures"):
        results = Results(settings, job.seeds, tuple(run.arms for run in runs))
        for name, figure in module.figures(results).items():
            save_figure(job.folder / "figures", name, figure)
            figures.append(_files(name, "", "figures"))
    for run in runs:
        for name, caption in run.figures.items():
            label = f"{name} (seed {run.seed})" if len(runs) > 1 else name
            figures.append(_files(name, caption, f"seed-{run.seed}/figures") | {"name": label})
    return figures


def _files(name: str, caption: str, folder: str) -> dict[str, str]:
    stem = name.replace(" ", "_").replace("/", "_")
    return {"name": name, "caption": caption, "svg": f"{folder}/{stem}.svg", "png": f"{folder}/{stem}.png"}


def command(job: Job) -> str:
    """The command line that repeats a run."""
    parts = ["torchfolio", "run", job.slug, "--scale", job.scale]
    first = job.seeds[0]
    if job.seeds == tuple(range(first, first + len(job.seeds))):
        parts += ["--seed", str(first)] if first else []
        parts += ["--seeds", str(len(job.seeds))] if len(job.seeds) > 1 else []
    parts += ["--device", job.device] if job.device != "auto" else []
    for key, value in job.settings.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        parts += ["--set", f"{key}={text}"]
    return shlex.join(parts)
