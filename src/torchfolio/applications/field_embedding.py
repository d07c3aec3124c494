"""Fields of a table and their embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.checks import whole

__all__ = ["Field", "FieldEmbedding", "Inputs", "Multi"]

INIT = 1e-4  # standard deviation of the embeddings, as in the published code


@dataclass(frozen=True)
class Multi:
    """A field that holds several values at once, given as 0/1 columns.

    Attributes:
        size: number of possible values.
    """

    size: int


Field = int | str | Multi
Inputs = Tensor | Mapping[str, Tensor]


class FieldEmbedding(nn.Module):
    """Embeddings of all fields, looked up in one table with offsets.

    A categorical field is looked up; a numeric one is its value times a learned vector; a multi-valued one is the mean
    of the vectors of the values it has (zero where it has none).

    Args:
        fields: kinds by name: a number of categories (index 0 stands for the unknown), `"numeric"`, or `Multi(size)`.
        dim: D, coordinates of an embedding.

    Shapes:
        a mapping from names to tensors (`[B]` of int64 or floats, `[B, size]` for `Multi`), or categorical columns
        `[B, F_c]` and the others side by side `[B, F_n]`, both in the order of `fields`; to `[B, F, D]`.

    Raises:
        ValueError: if a kind is unknown, a size below 1, or an index outside a field's categories.
    """

    offsets: Tensor
    sizes: Tensor
    order: Tensor

    def __init__(self, fields: Mapping[str, Field], dim: int = 16) -> None:
        super().__init__()
        if not fields:
            raise ValueError("expected at least one field, got none")
        self.fields, self.dim = dict(fields), whole("dim", dim, 1)
        self.categorical = [n for n, kind in self.fields.items() if isinstance(kind, int)]
        self.numeric = [n for n, kind in self.fields.items() if kind == "numeric"]
        self.multi = {n: kind.size for n, kind in self.fields.items() if isinstance(kind, Multi)}
        for name, kind in self.fields.items():
            size = kind.size if isinstance(kind, Multi) else kind
            if isinstance(size, str) and size != "numeric":
                raise ValueError(
                    f"expected field {name!r} to be a number of categories, 'numeric' or Multi, got {size!r}"
                )
            if not isinstance(size, str):
                whole(f"size of {name!r}", size, 1)
        counts = [int(self.fields[n]) for n in self.categorical]  # pyright: ignore[reportArgumentType]
        self.register_buffer("sizes", torch.tensor(counts, dtype=torch.int64), persistent=False)
        self.register_buffer("offsets", torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)[:-1], persistent=False)
        self.table = nn.Embedding(sum(counts), dim) if counts else None
        self.others = len(self.numeric) + sum(self.multi.values())  # columns that are not categorical
        self.vectors = nn.Parameter(torch.empty(self.others, dim)) if self.others else None
        columns = [*self.categorical, *self.numeric, *self.multi]
        self.register_buffer("order", torch.tensor([columns.index(n) for n in self.fields]), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw embeddings from N(0, 1e-8), unknown values start at 0."""
        if self.vectors is not None:
            nn.init.normal_(self.vectors, std=INIT)
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=INIT)
            self.table.weight[self.offsets] = 0

    def forward(self, x: Inputs, others: Tensor | None = None) -> Tensor:
        if isinstance(x, Mapping):
            x, others = self._columns(x)
        parts = []
        if self.table is not None:
            if x.shape[-1] != len(self.categorical):
                raise ValueError(f"expected {len(self.categorical)} categorical columns, got shape {tuple(x.shape)}")
            if not torch.compiler.is_compiling() and bool(((x < 0) | (x >= self.sizes)).any()):
                wrong = int(((x < 0) | (x >= self.sizes)).any(0).nonzero()[0])
                raise ValueError(
                    f"expected indices of {self.categorical[wrong]!r} from 0 to {int(self.sizes[wrong]) - 1}, got "
                    f"{int(x[:, wrong].min())} to {int(x[:, wrong].max())}"
                )
            parts.append(self.table(x + self.offsets))
        if self.vectors is not None:
            if others is None or others.shape[-1] != self.others:
                raise ValueError(
                    f"expected {self.others} numeric columns, got {None if others is None else tuple(others.shape)}"
                )
            values = others.to(self.vectors.dtype)
            count = len(self.numeric)
            if count:
                parts.append(values[:, :count, None] * self.vectors[:count])
            start = count
            for size in self.multi.values():
                flags = values[:, start : start + size]
                mean = flags @ self.vectors[start : start + size] / flags.sum(1, keepdim=True).clamp_min(1)
                parts.append(mean[:, None])
                start += size
        return torch.cat(parts, 1)[:, self.order]

    def _columns(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        missing = [name for name in self.fields if name not in x]
        if missing:
            raise ValueError(f"the field {missing[0]!r} is missing; there are {', '.join(x)}")
        some = next(iter(x.values()))
        kinds = [x[name].long() for name in self.categorical]
        categorical = (
            torch.stack(kinds, 1) if kinds else torch.zeros(len(some), 0, dtype=torch.int64, device=some.device)
        )
        rest = [x[name][:, None].float() for name in self.numeric] + [x[name].float() for name in self.multi]
        return categorical, torch.cat(rest, 1) if rest else None

    def penalty(self) -> Tensor:
        """Half the sum of squares of all embeddings."""
        tables = [t for t in (self.vectors, None if self.table is None else self.table.weight) if t is not None]
        return torch.stack([0.5 * table.square().sum() for table in tables]).sum()
