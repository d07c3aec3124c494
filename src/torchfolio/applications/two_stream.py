"""FinalMLP: two perceptrons on the same field embeddings, told apart by gates and joined by a bilinear form.

For click-through prediction on tables of categorical and numeric fields. With $e$ the concatenated embeddings of F fields,
streams $s \\in \\{1, 2\\}$ and k heads,

$$h_s = 2\\sigma(g_s(x_s)) \\odot e, \\quad o_s = \\mathrm{MLP}_s(h_s), \\quad
\\mathrm{logit} = w_1^\\top o_1 + b_1 + w_2^\\top o_2 + b_2 + \\sum_{j=1}^{k} o_{1,j}^\\top W_j\\, o_{2,j},$$

where the gate of a stream sees its context fields alone, through embeddings of its own. Without gates and with W = 0 it
is DualMLP, the paper's baseline.

Reference:
    Mao et al., FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction, AAAI 2023 (arXiv 2304.00902), Section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchfolio.applications.field_embedding import Field, FieldEmbedding, Inputs, Multi
from torchfolio.checks import between, whole

__all__ = ["BilinearFusion", "DualMLP", "FeatureGating", "FieldEmbedding", "FinalMLP", "Multi"]


def _mlp(inputs: int, hidden: Sequence[int], dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, whole("width", width, 1)), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
        inputs = width
    for layer in layers:
        if isinstance(layer, nn.Linear):
            _xavier(layer)
    return nn.Sequential(*layers)


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class FeatureGating(nn.Module):
    """Gates $2\\sigma(g(x))$ in (0, 2) for every coordinate of the embeddings, from some fields alone.

    Args:
        fields: all fields, see `FieldEmbedding`.
        dim: D.
        context: names of the fields that the gates depend on. Without any they are the same for every example, and at
            first 1; as in the published code only the last bias then learns.
        hidden: widths of hidden layers.

    Shapes:
        as `FieldEmbedding`, to gates `[B, F * D]`.
    """

    context: nn.Parameter | None
    columns: Tensor
    other_columns: Tensor

    def __init__(
        self, fields: Mapping[str, Field], dim: int = 16, context: Sequence[str] = (), hidden: Sequence[int] = (64,)
    ) -> None:
        super().__init__()
        unknown = [name for name in context if name not in fields]
        if unknown:
            raise ValueError(f"there is no field {unknown[0]!r} to take as context; there are {', '.join(fields)}")
        self.names = tuple(context)
        own = {name: fields[name] for name in fields if name in context}
        self.embedding = FieldEmbedding(own, dim) if own else None
        self.context = None if own else nn.Parameter(torch.zeros(dim))
        categorical = [n for n, kind in fields.items() if isinstance(kind, int)]
        self.register_buffer(
            "columns",
            torch.tensor([k for k, n in enumerate(categorical) if n in own], dtype=torch.int64),
            persistent=False,
        )
        self.register_buffer("other_columns", torch.tensor(_others(fields, own), dtype=torch.int64), persistent=False)
        width = dim * max(len(own), 1)
        last = hidden[-1] if len(hidden) else width
        self.net = nn.Sequential(*_mlp(width, hidden), _xavier(nn.Linear(last, dim * len(fields))))

    def forward(self, x: Inputs, others: Tensor | None = None) -> Tensor:
        if self.embedding is None:
            assert self.context is not None
            count = len(next(iter(x.values()))) if isinstance(x, Mapping) else len(x)
            gates = 2 * self.net(self.context).sigmoid()
            return gates.expand(count, -1)
        if not isinstance(x, Mapping):
            x = x[:, self.columns]
            others = None if others is None else others[:, self.other_columns]
        return 2 * self.net(self.embedding(x, others).flatten(1)).sigmoid()


def _others(fields: Mapping[str, Field], own: Mapping[str, Field]) -> list[int]:
    """Places, among the columns that are not categorical, of those of some fields."""
    places, start = [], 0
    rest = [n for n, k in fields.items() if k == "numeric"] + [n for n, k in fields.items() if isinstance(k, Multi)]
    for name in rest:
        kind = fields[name]
        size = kind.size if isinstance(kind, Multi) else 1
        places += range(start, start + size) if name in own else []
        start += size
    return places


class BilinearFusion(nn.Module):
    """Joins two vectors: $w_1^\\top o_1 + b_1 + w_2^\\top o_2 + b_2 + \\sum_j o_{1,j}^\\top W_j\\, o_{2,j}$.

    Args:
        d1: size of the first.
        d2: size of the second.
        heads: k, which divides both: the vectors are cut into k chunks that meet in pairs.
        out: number of outputs.

    Shapes:
        `[B, d1]` and `[B, d2]` to `[B, out]`. `weight` is `[k, d1 / k, d2 / k, out]`.
    """

    def __init__(self, d1: int, d2: int, heads: int = 1, out: int = 1) -> None:
        super().__init__()
        self.heads = whole("heads", heads, 1)
        for name, width in (("d1", d1), ("d2", d2)):
            if width % heads:
                raise ValueError(f"expected heads to divide {name} = {width}, got {heads}")
        self.first, self.second = _xavier(nn.Linear(d1, out)), _xavier(nn.Linear(d2, out))
        flat = torch.empty(d1 * d2 // heads, out)
        nn.init.xavier_normal_(flat)
        self.weight = nn.Parameter(flat.view(heads, d1 // heads, d2 // heads, out))

    def forward(self, o1: Tensor, o2: Tensor) -> Tensor:
        a, b = o1.unflatten(-1, (self.heads, -1)), o2.unflatten(-1, (self.heads, -1))
        return self.first(o1) + self.second(o2) + torch.einsum("bkp,kpqo,bkq->bo", a, self.weight, b)


class FinalMLP(nn.Module):
    """The two-stream network.

    Args:
        fields: fields, see `FieldEmbedding`.
        dim: D.
        hidden_1: widths of the first stream.
        hidden_2: widths of the second stream.
        heads: number of heads of the fusion; divides both last widths.
        gates: whether embeddings are gated.
        context_1: context fields of the first stream's gates.
        context_2: context fields of the second stream's gates.
        gate_hidden: widths of the gates' hidden layers.
        dropout: probability of dropout in the streams.
        batch_norm: whether the streams have batch norm.
        bilinear: whether the streams meet in a product; their sum is taken otherwise.

    Shapes:
        as `FieldEmbedding`, to logits `[B]`.

    Example:
        >>> net = FinalMLP({"user": 100, "item": 50, "price": "numeric"}, context_1=("user",), context_2=("item",))
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        dim: int = 16,
        hidden_1: Sequence[int] = (64, 64, 64),
        hidden_2: Sequence[int] = (64, 64, 64),
        heads: int = 1,
        gates: bool = True,
        context_1: Sequence[str] = (),
        context_2: Sequence[str] = (),
        gate_hidden: Sequence[int] = (64,),
        dropout: float = 0.0,
        batch_norm: bool = False,
        bilinear: bool = True,
    ) -> None:
        super().__init__()
        between("dropout", dropout, 0, 1, inclusive=(True, False))
        if not hidden_1 or not hidden_2:
            raise ValueError("expected at least one layer in each stream, got none")
        self.embedding = FieldEmbedding(fields, dim)
        contexts = (context_1, context_2)
        self.gates = nn.ModuleList(FeatureGating(fields, dim, c, gate_hidden) for c in contexts) if gates else None
        width = dim * len(fields)
        self.stream_1, self.stream_2 = (_mlp(width, hidden, dropout, batch_norm) for hidden in (hidden_1, hidden_2))
        self.fusion = BilinearFusion(hidden_1[-1], hidden_2[-1], heads if bilinear else 1)
        if not bilinear:
            nn.init.zeros_(self.fusion.weight)
            self.fusion.weight.requires_grad_(False)

    def forward(self, x: Inputs, others: Tensor | None = None) -> Tensor:
        e = self.embedding(x, others).flatten(1)
        first, second = (e, e) if self.gates is None else (gate(x, others) * e for gate in self.gates)
        return self.fusion(self.stream_1(first), self.stream_2(second))[:, 0]

    @torch.no_grad()
    def field_gates(self, x: Inputs, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean gates of the fields, `[B, F]` for each stream: what it looks at; 1 everywhere without gates."""
        if self.gates is None:
            count = len(next(iter(x.values()))) if isinstance(x, Mapping) else len(x)
            ones = torch.ones(count, len(self.embedding.fields))
            return ones, ones.clone()
        gates = [gate(x, others).unflatten(1, (-1, self.embedding.dim)).mean(2) for gate in self.gates]
        return gates[0], gates[1]

    def penalty(self) -> Tensor:
        """Half the sum of squares of all embedding tables, those of the gates' contexts included."""
        tables = [m for m in self.modules() if isinstance(m, FieldEmbedding)]
        return torch.stack([table.penalty() for table in tables]).sum()


class DualMLP(FinalMLP):
    """The baseline: two streams without gates whose logits are added up; arguments of `FinalMLP` but for those."""

    def __init__(
        self,
        fields: Mapping[str, Field],
        dim: int = 16,
        hidden_1: Sequence[int] = (64, 64, 64),
        hidden_2: Sequence[int] = (64, 64, 64),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(
            fields, dim, hidden_1, hidden_2, gates=False, dropout=dropout, batch_norm=batch_norm, bilinear=False
        )
