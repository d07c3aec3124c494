"""An experiment of two arms that take their time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    seconds: float = 1.0


SCALES = {"quick": Settings()}
CLAIMS = {"order": "second > first"}


def run(run):
    def arm(offset):
        time.sleep(run.settings.seconds)
        return {"value": offset + float(torch.rand(()))}

    first, second = run.arm("first", arm, 0.0), run.arm("second", arm, 2.0)
    run.values("order", first=first["value"], second=second["value"])
