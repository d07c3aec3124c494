"""One seed of an experiment, measured."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

from torchfolio.runs.job import Job, Say, claims_of
from torchfolio.runs.run import Run
from torchfolio.runs.settings import override
from torchfolio.runs.store import read_result

__all__ = ["Measured", "draw_off_screen", "measure_seed"]


@dataclass(frozen=True)
class Measured:
    """What one seed gave, apart from its arms, which are in the folder of the run.

    Attributes:
        seed: seed of the run.
        values: values of the claims, by id.
        seconds: seconds that each arm took.
        figures: captions of the pictures, by name.
    """

    seed: int
    values: dict[str, dict[str, float]]
    seconds: dict[str, float]
    figures: dict[str, str]

    def arms(self, job: Job) -> dict[str, dict[str, Any]]:
        """Results of the arms, read from their files."""
        folder = job.folder / f"seed-{self.seed}" / "arms"
        return {name: read_result(folder / f"{name}.json") for name in self.seconds}


def measure_seed(job: Job, seed: int, say: Say) -> Measured:
    """Run one seed; arms that are stored are not computed again."""
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
    return Measured(seed, run.measured, run.seconds, run.figures)


def draw_off_screen() -> None:
    """Have matplotlib open no windows, whether it has been imported or will be."""
    os.environ["MPLBACKEND"] = "agg"
    if "matplotlib" in sys.modules:
        sys.modules["matplotlib"].use("agg")
