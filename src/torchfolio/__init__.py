"""Published methods for training, shrinking, adapting, auditing and understanding neural networks.

Importing the package is cheap: the floors (`engine`, `measure`, `models`, `data`, `catalog`, …) are imported
when they are first used, so that the catalogue and the command line answer without importing torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

try:
    __version__ = version("torchfolio")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HERE = Path(__file__).parent
_PARTS = sorted(
    path.stem
    for path in _HERE.iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
)


def __getattr__(name: str) -> ModuleType:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_PARTS, "__doc__", "__name__", "__path__", "__version__"]
