"""How objects with settings show themselves."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["Shown"]

LONGEST = 60  # of a value that is written out
_NOTHING = object()


class Shown:
    """Shows itself as it may have been made: its class, and the settings that are not the default ones.

    For a dataclass with `repr=False` those are its fields.

    A setting is an argument of the constructor that is kept under its name; networks, functions and tensors appear by name or
    shape alone.

    Example:
        >>> AugLocal(aux_depth=3)
        AugLocal(aux_depth=3)
    """

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = vars(self).get(name, vars(self).get(f"_{name}", _NOTHING))
            if value is _NOTHING or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if value is parameter.default or _text(value) == _text(parameter.default):
                continue
            if parameter.default is None and inspect.isroutine(value) and value.__module__.startswith("torchfolio."):
                continue  # what the library itself puts where nothing is given
            shown.append(f"{name}={_text(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _text(value: Any) -> str:
    """A value in a few words."""
    if hasattr(value, "parameters") and hasattr(value, "state_dict"):
        return type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__.lower()} {list(value.shape)}" if value.shape else repr(value.item())
    if inspect.isroutine(value) or inspect.isclass(value):
        return str(getattr(value, "__name__", type(value).__name__))
    if isinstance(value, list | tuple):
        # A list and a tuple of the same settings are the same settings.
        text = ", ".join(map(_text, value))
        return f"({text},)" if len(value) == 1 else f"({text})"
    text = repr(value)
    if text.startswith("<") or " at 0x" in text or len(text) > LONGEST:
        return type(value).__name__
    return text
