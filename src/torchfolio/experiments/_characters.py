"""A small character transformer, and windows of text in two languages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchfolio.data.text import multi30k

__all__ = ["CharacterModel", "Windows", "windows"]


class CharacterModel(nn.Module):
    """A pre-norm transformer that predicts the next character."""

    def __init__(self, characters: int, length: int, dim: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, dim)
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))
        block: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(dim, 4, 4 * dim, **block) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2)  # [B, characters, T], as cross-entropy takes it


class Windows(NamedTuple):
    """Windows of characters `[N, T + 1]`: of a random language each to train on, of both to validate on."""

    train: Tensor
    held: Tensor
    characters: int


def windows(name: str, length: int, *, train: int, held: int, seed: int) -> Windows:
    """Draw windows.

    Args:
        name: `"multi30k"`, or `"embedded"` for two tiny made-up languages.
        length: characters of a window, T.
        train: number of windows to train on.
        held: number of windows of each language to validate on.
        seed: random seed.
    """
    if name == "embedded":
        languages = [
            ("the cat sat on the mat. " * 40, "a dog ran by. " * 40),
            ("die katze schlief. " * 40, "ja. " * 90),
        ]
    else:
        found = multi30k()
        pick = [(found["train"].texts, found["val"].texts), (found["train"].targets, found["val"].targets)]
        languages = [("\n".join(a).lower(), "\n".join(b).lower()) for a, b in pick]
    letters = sorted({letter for texts, _ in languages for letter in texts})
    number = {letter: k + 1 for k, letter in enumerate(letters)}  # 0 stands for what training never saw
    ids = [[torch.tensor([number.get(letter, 0) for letter in part]) for part in texts] for texts in languages]
    generator = torch.Generator().manual_seed(seed)

    def cut(text: Tensor, count: int) -> Tensor:
        starts = torch.randint(len(text) - length, (count,), generator=generator)
        return text[starts[:, None] + torch.arange(length + 1)]

    both = torch.stack([cut(texts, train) for texts, _ in ids])
    language = torch.randint(2, (train,), generator=generator)
    seen = both[language, torch.arange(train)]
    return Windows(seen, torch.cat([cut(text, held) for _, text in ids]), len(letters) + 1)
