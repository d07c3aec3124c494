"""One seed of an experiment, measured."""

from __future__ import annotations

import importlib
from typing import Any

from torchfolio.runs.job import Job, Say, claims_of
from torchfolio.runs.run import Run
from torchfolio.runs.settings import override

__all__ = ["measure_seed"]


def measure_seed(job: Job, seed: int, say: Say) -> Run[Any]:
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
