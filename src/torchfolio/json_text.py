"""JSON as every reader takes it, of whatever a result holds. Neither torch nor numpy is imported here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["plain", "to_json"]


def plain(value: Any) -> Any:
    """A value in JSON's own types: arrays, tensors and their scalars become lists and numbers, sequences lists, keys
    text, and numbers that are not finite `None`.

    What JSON has no type for stays, so that writing it names it.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return value


def to_json(value: Any, **options: Any) -> str:
    """JSON text of `plain(value)`; `options` go to `json.dumps`.

    Raises:
        TypeError: if the value holds what JSON has no type for.
    """
    return json.dumps(plain(value), allow_nan=False, **options)
