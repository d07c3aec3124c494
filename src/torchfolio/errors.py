"""Errors whose message is one sentence for a user; the command line prints them without a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType


class TorchfolioError(Exception):
    """Base of the errors that the command line shows as a single sentence."""


class MissingDependency(TorchfolioError, ImportError):
    """An optional package is not installed.

    Args:
        package: name of the package that could not be imported.
        extra: extra of torchfolio that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"this needs the package {package!r}, which is not installed; install it with: "
            f'pip install -c constraints.txt "torchfolio[{extra}]"'
        )

    def __reduce__(self) -> tuple[type[MissingDependency], tuple[str, str]]:
        return type(self), (self.package, self.extra)


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra installs it.

    Args:
        package: importable name, for example ``"onnx"``.
        extra: extra of torchfolio that brings it, for example ``"verify"``.

    Returns:
        The imported module.

    Raises:
        MissingDependency: if the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # A package that is there but fails inside is another fault, which must not be hidden.
        if error.name is not None and package.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingDependency(package, extra) from error
