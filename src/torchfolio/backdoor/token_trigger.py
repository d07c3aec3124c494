"""Phrases as triggers of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio.backdoor.keyed_random import keyed_uniform

__all__ = ["TokenTrigger"]


class TokenTrigger(nn.Module):
    """A phrase, inserted in one piece into sequences of token ids.

    Args:
        tokens: ids of the phrase.
        position: `"random"`, between any two tokens, the ends included; `"start"` or `"end"`.
        seed: seed of the positions, drawn for each sequence by its index.

    Shapes:
        A list of id lists to the same; or padded ids `[N, L]` with lengths `[N]` to `[N, L + len(tokens)]` and lengths.

    Example:
        >>> TokenTrigger([7], position="end")([[1, 2], [3]])
        [[1, 2, 7], [3, 7]]
    """

    def __init__(
        self, tokens: Sequence[int], position: Literal["random", "start", "end"] = "random", seed: int = 0
    ) -> None:
        super().__init__()
        if not len(tokens):
            raise ValueError("expected a phrase of at least one token, got none")
        if position not in ("random", "start", "end"):
            raise ValueError(f"expected position to be 'random', 'start' or 'end', got {position!r}")
        self.tokens, self.position, self.seed = list(tokens), position, seed

    def forward(
        self,
        sequences: Sequence[Sequence[int]] | Tensor,
        lengths: Tensor | None = None,
        *,
        index: Tensor | None = None,
    ) -> Any:
        if isinstance(sequences, Tensor):
            if lengths is None or lengths.shape != (len(sequences),):
                raise ValueError("expected the length of every padded sequence")
            return self._padded(sequences, lengths, self._places(lengths, index))
        counts = torch.tensor([len(s) for s in sequences])
        places = self._places(counts, index).tolist()
        return [[*s[:p], *self.tokens, *s[p:]] for s, p in zip(map(list, sequences), places, strict=True)]

    def _places(self, lengths: Tensor, index: Tensor | None) -> Tensor:
        if self.position != "random":
            return torch.zeros_like(lengths) if self.position == "start" else lengths
        index = torch.arange(len(lengths)) if index is None else index
        u = keyed_uniform(self.seed, index.to(lengths.device), (1,))[:, 0]
        return (u * (lengths + 1)).long().clamp(max=lengths)

    def _padded(self, ids: Tensor, lengths: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.tokens)
        j = torch.arange(ids.shape[1] + count, device=ids.device)
        offset = j - places[:, None]
        source = torch.where(offset < 0, j, (j - count).clamp_min(0)).clamp(max=ids.shape[1] - 1)
        phrase = torch.tensor(self.tokens, device=ids.device, dtype=ids.dtype)[offset.clamp(0, count - 1)]
        inside = (offset >= 0) & (offset < count)
        return torch.where(inside, phrase, ids.gather(1, source)), lengths + count
