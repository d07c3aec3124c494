"""One experiment as it was asked for: its settings, its folder, and the command that repeats it."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from torchfolio import catalog
from torchfolio.catalog import Claim
from torchfolio.errors import TorchfolioError
from torchfolio.runs.outcome import Outcome
from torchfolio.runs.settings import override
from torchfolio.runs.store import write_json

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
    from torchfolio.bundle import resolve
    from torchfolio.engine.devices import resolve_device
    from torchfolio.models import spec

    module = experiment(slug) if isinstance(slug, str) else slug
    slug = slug if isinstance(slug, str) else slug.__name__.rpartition(".")[2]
    if scale not in module.SCALES:
        raise TorchfolioError(f"{slug} has the scales {', '.join(module.SCALES)}, got {scale!r}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"expected seeds that differ, at least one, got {list(seeds)}")
    resolve_device(device)
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
