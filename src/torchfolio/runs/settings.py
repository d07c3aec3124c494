"""Settings of an experiment: what each one is, and how it is read from text."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from types import NoneType, UnionType
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


def setting(default: T, doc: str) -> T:
    """A field of a frozen dataclass of settings, with the words that `torchfolio show SLUG --settings` prints beside it.

    Args:
        default: its value at the scale `quick`, unless the scale says otherwise.
        doc: what it is, beginning with a noun, with its unit, as in `epochs: int = setting(8, "number of passes")`.
    """
    return field(default=default, metadata={"doc": doc})  # pyright: ignore[reportReturnType]


def described(settings: Any) -> dict[str, tuple[Any, str]]:
    """Value and words of every setting, by name; words stand where the setting was first declared, empty where nowhere."""
    docs: dict[str, str] = {}
    for kind in type(settings).__mro__:
        for name, declared in vars(kind).get("__dataclass_fields__", {}).items():
            docs[name] = docs.get(name) or declared.metadata.get("doc", "")
    return {one.name: (getattr(settings, one.name), docs[one.name]) for one in fields(settings)}


def override(settings: S, changes: Mapping[str, Any]) -> S:
    """Settings with changes; text is read as the type of its field.

    Raises:
        ValueError: on an unknown key, with the nearest ones, or a value of another type.
    """
    kinds = typing.get_type_hints(type(settings))
    known = [f.name for f in fields(settings)]  # pyright: ignore[reportArgumentType]
    values = {}
    for key, value in changes.items():
        if key == "model" and key not in known:
            raise ValueError("there is no setting 'model': the claims of this experiment are about networks of its own")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3) or known
            raise ValueError(f"there is no setting {key!r}; did you mean {', '.join(close)}?")
        values[key] = _read(key, value, kinds[key]) if isinstance(value, str) else _like(value, getattr(settings, key))
    return replace(settings, **values)  # pyright: ignore[reportArgumentType, reportCallIssue, reportType]


def _like(value: Any, old: Any) -> Any:
    return tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value


def _read(key: str, text: str, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, UnionType):
        options = typing.get_args(kind)
        if NoneType in options and text.lower() in ("none", ""):
            return None
        for option in options:
            if option is not NoneType:
                try:
                    return _read(key, text, option)
                except ValueError:
                    continue
        raise ValueError(f"expected {key} to be {kind}, got {text!r}")
    if origin is tuple:
        element = typing.get_args(kind)[0]
        return tuple(_read(key, part.strip(), element) for part in text.strip("()[] ").split(",") if part.strip())
    if origin is typing.Literal:
        if text not in map(str, typing.get_args(kind)):
            raise ValueError(f"expected {key} to be one of {', '.join(map(str, typing.get_args(kind)))}, got {text!r}")
        return next(v for v in typing.get_args(kind) if str(v) == text)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"expected {key} to be true or false, got {text!r}")
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected {key} to be {getattr(kind, '__name__', kind)}, got {text!r}") from error


def parse(pairs: Sequence[str]) -> dict[str, str]:
    """`key=value` pairs.

    Raises:
        ValueError: if a pair has no `=`.
    """
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"expected key=value, got {pair!r}")
        settings[key.strip()] = value.strip()
    return settings
