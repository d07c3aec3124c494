"""What the scripts behind a page of advice share: a table with its command, and a picture, where the docs find them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"


def write(name: str, command: str, rows: Sequence[Mapping[str, Any]], figure: Figure, folder: Path = DOCS) -> None:
    """Write `measured/NAME.json` and `assets/NAME.svg`, which the page that holds `<!-- measured: NAME -->` shows."""
    import matplotlib.pyplot as plt

    body = {"command": command, "torch": torch.__version__, "machine": platform.machine(), "rows": list(rows)}
    for part in ("measured", "assets"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "measured" / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    with plt.rc_context({"svg.hashsalt": "torchfolio"}):
        figure.savefig(folder / "assets" / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
