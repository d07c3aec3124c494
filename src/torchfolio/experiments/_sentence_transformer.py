"""A small transformer that classifies sentences, and sentences: film reviews, or random ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.data.text import encode, movie_reviews, train_tokenizer

__all__ = ["SentenceTransformer", "sentences"]


class SentenceTransformer(nn.Module):
    """A small transformer for sentences: the mean of its tokens is classified."""

    def __init__(self, words: int, length: int, dim: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, dim, padding_idx=0), nn.Parameter(torch.zeros(length, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.3, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(dim, 2)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids == 0
        x = self.body(self.words(ids) + self.places, src_key_padding_mask=mask)
        there = (~mask)[..., None].to(x.dtype)
        return self.head((x * there).sum(1) / there.sum(1).clamp(min=1))


def sentences(text: bool, length: int = 32) -> dict[str, tuple[Tensor, Tensor]]:
    """Token numbers and labels of film reviews, or random ones."""
    if not text:
        ids = torch.randint(1, 50, (240, length), generator=torch.Generator().manual_seed(0))
        labels = (ids[:, :8].float().mean(1) > 25).long()
        return {"train": (ids[:160], labels[:160]), "test": (ids[160:], labels[160:])}
    parts = movie_reviews()
    tokenizer = train_tokenizer(parts["train"].texts, 4000)
    return {n: (encode(tokenizer, p.texts, length), torch.tensor(p.targets)) for n, p in parts.items()}
