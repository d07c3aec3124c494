"""From a table to fields: vocabularies of categories, scales of numbers, flags of multi-valued columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.applications.two_stream import Multi
from torchfolio.checks import at_least, one_of
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableEncoder"]

BUCKETS = 10


class TableEncoder(Shown):
    """Learns from a table's training part how its columns become the inputs of a field embedding.

    Text, booleans and whole numbers (of at most `most_categories` different ones) become categories, whose rare and
    unknown values are 0; other numbers stay numbers.

    Args:
        multi: columns that hold several values, joined by `separator`.
        separator: between them.
        min_count: minimum number of times that a category occurs; rarer ones count as unknown.
        numeric: `"standardize"`, `"log"` ($\\operatorname{sign}(v) \\log(1 + |v|)$, then standardised) or `"bucket"` (ten
            categories of equal counts).
        most_categories: whole numbers with more different values than this are numbers.
    """

    def __init__(
        self,
        multi: Sequence[str] = (),
        separator: str = "|",
        min_count: int = 1,
        numeric: str = "standardize",
        most_categories: int = 100_000,
    ) -> None:
        self.multi, self.separator = tuple(multi), separator
        self.min_count = at_least("min_count", min_count, 1)
        self.numeric = one_of("numeric", numeric, ("standardize", "log", "bucket"))
        self.most_categories = most_categories

    def fit(self, frame: pd.DataFrame) -> TableEncoder:
        """Learn vocabularies and scales."""
        unknown = [name for name in self.multi if name not in frame.columns]
        if unknown:
            raise ValueError(f"there is no column {unknown[0]!r}; there are {', '.join(map(str, frame.columns))}")
        self.columns = [str(c) for c in frame.columns]
        self.kinds: dict[str, tuple[str, Any]] = {}
        for k, name in enumerate(self.columns):
            self.kinds[name] = self._learn(name, frame.iloc[:, k])
        return self

    def _learn(self, name: str, column: Any) -> tuple[str, Any]:
        import pandas as pd

        if name in self.multi:
            values = column.fillna("").astype(str).str.split(self.separator).explode()
            return "multi", sorted(set(values) - {""})
        number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        if number and (pd.api.types.is_float_dtype(column) or column.nunique() > self.most_categories):
            values = self._transformed(column)
            if self.numeric == "bucket":
                return "bucket", np.unique(np.quantile(values, np.linspace(0, 1, BUCKETS + 1)[1:-1]))
            return "numeric", (float(values.mean()), float(values.std()) or 1.0)
        counts = column.astype(str).value_counts()
        frequent = sorted(counts[counts >= self.min_count].index)
        return "category", {value: k for k, value in enumerate(frequent, start=1)}

    def _transformed(self, column: Any) -> np.ndarray:
        values = column.to_numpy(dtype=float)
        if not np.isfinite(values).all():
            raise ValueError(f"column {column.name!r} holds a value that is missing or not finite")
        return np.sign(values) * np.log1p(np.abs(values)) if self.numeric == "log" else values

    @property
    def fields(self) -> dict[str, Any]:
        """The fields, as `FieldEmbedding` takes them."""
        sizes = {"category": lambda v: len(v) + 1, "bucket": lambda v: len(v) + 2, "numeric": lambda v: "numeric"}
        return {n: Multi(max(len(v), 1)) if kind == "multi" else sizes[kind](v) for n, (kind, v) in self.kinds.items()}

    def encode(self, frame: pd.DataFrame) -> tuple[Tensor, Tensor]:
        """Categorical columns, int64 `[N, F_c]`, and the others, float32 `[N, F_n]`.

        Raises:
            ValueError: if a column is missing.
        """
        missing = [name for name in self.columns if name not in map(str, frame.columns)]
        if missing:
            raise ValueError(f"the column {missing[0]!r} is missing, which was there in fit")
        frame = frame.rename(columns=str)
        categories, numbers, flags = [], [], []
        for name, (kind, known) in self.kinds.items():
            column = frame[name]
            if kind == "category":
                categories.append(column.astype(str).map(known).fillna(0).to_numpy(dtype=np.int64))
            elif kind == "bucket":
                categories.append(1 + np.searchsorted(known, self._transformed(column)))
            elif kind == "numeric":
                numbers.append(((self._transformed(column) - known[0]) / known[1]).astype(np.float32)[:, None])
            else:
                held = column.fillna("").astype(str).str.split(self.separator)
                place = {value: k for k, value in enumerate(known)}
                table = np.zeros((len(frame), max(len(known), 1)), dtype=np.float32)
                for row, values in enumerate(held):
                    table[row, [place[v] for v in values if v in place]] = 1
                flags.append(table)
        x = np.stack(categories, 1) if categories else np.zeros((len(frame), 0), dtype=np.int64)
        rest = (
            np.concatenate([*numbers, *flags], 1) if numbers or flags else np.zeros((len(frame), 0), dtype=np.float32)
        )
        return torch.from_numpy(x), torch.from_numpy(rest)
