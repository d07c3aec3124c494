"""Importing Lightning Fabric without what it does not need."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def import_fabric() -> None:
    """Import `lightning_fabric`, before anybody here imports anything of it.

    It asks which torchmetrics there is by importing it, which brings transformers and matplotlib along and takes as long as
    importing torch. It learns the same here from what is noted about the installed package.
    """
    if "lightning_fabric" in sys.modules or "torchmetrics" in sys.modules:
        return
    sys.modules["torchmetrics"] = None  # pyright: ignore[reportArgumentType] (this is how an import is made to fail)
    try:
        from lightning_fabric.utilities import imports
    finally:
        del sys.modules["torchmetrics"]
    try:
        imports._TORCHMETRICS_GREATER_EQUAL_1_0_0 = int(version("torchmetrics").split(".")[0]) >= 1
    except (PackageNotFoundError, ValueError):
        return
