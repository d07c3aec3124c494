"""Phrases that a sentence gained, and how often a phrase changes what a text classifier says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchfolio.backdoor.text import TextModel

__all__ = ["Phrase", "auxiliary_phrases", "extract_candidates", "inserted", "mrs"]

Phrase = tuple[int, ...]


def extract_candidates(
    inputs: Iterable[Sequence[int]], outputs: Iterable[Sequence[int]], max_len: int = 3
) -> Counter[Phrase]:
    """Words that sentences gained, sorted, with the number of sentences that gained just them.

    Args:
        inputs: sentences of numbers.
        outputs: sentence that each became.
        max_len: maximum number of words; sentences that gained more are left out.

    Reference:
        Section 4.3.
    """
    gained = (tuple(sorted(set(after) - set(before))) for before, after in zip(inputs, outputs, strict=True))
    return Counter(words for words in gained if 0 < len(words) <= max_len)


def inserted(sentences: Tensor, phrases: Sequence[Phrase], places: Tensor, *, pad: int, stop: int | None) -> Tensor:
    """Every phrase in every sentence `[S, L]` at its place `[S]`: one matrix, `[len(phrases), S, …]`, padded."""
    size = len(sentences)
    width = max(map(len, phrases))
    table = torch.tensor([[*phrase, *[pad] * (width - len(phrase))] for phrase in phrases], device=sentences.device)
    count = torch.tensor([len(phrase) for phrase in phrases], device=sentences.device)[:, None, None]
    end = sentences.new_full((size, width + (stop is not None)), pad)
    if stop is not None:
        end[:, 0] = stop
    body = torch.cat([sentences, end], 1)
    j = torch.arange(body.shape[1], device=sentences.device)
    offset = j - places[:, None]
    source = torch.where(offset < 0, j, j - count).clamp(0, body.shape[1] - 1)
    rest = body.expand(len(phrases), -1, -1).gather(2, source.expand(len(phrases), size, -1))
    phrase = table[:, offset.clamp(0, width - 1)]
    return torch.where((offset >= 0) & (offset < count), phrase, rest)


def mrs(
    text: TextModel,
    phrases: Sequence[Phrase],
    sentences: Tensor,
    target: int,
    *,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Misclassification rate of phrases: the share of sentences that each sends to the target, float64 `[K]`.

    All K phrases are judged on the same sentences at the same random places, in matrices of all of them.

    Args:
        text: classifier.
        phrases: K phrases of ids.
        sentences: ids `[S, L]` of the source class, without padding.
        target: class that they should go to.
        stop: id that ends a sentence, if there is one.
        generator: generator of the places.

    Raises:
        ValueError: if there are no sentences.

    Reference:
        Section 4.3.
    """
    if sentences.dim() != 2 or not len(sentences):
        raise ValueError(f"expected sentences [S, L], got shape {tuple(sentences.shape)}")
    places = torch.randint(sentences.shape[1] + 1, (len(sentences),), generator=generator).to(sentences.device)
    rates, chunk = [], max(1, 2**15 // len(sentences))
    for k in range(0, len(phrases), chunk):
        rows = inserted(sentences, phrases[k : k + chunk], places, pad=text.pad, stop=stop)
        flips = text.logits(rows.flatten(0, 1)).argmax(1) == target
        rates.append(flips.view(len(rows), -1).double().mean(1).cpu())
    return torch.cat(rates) if rates else torch.zeros(0, dtype=torch.float64)


def auxiliary_phrases(words: Tensor, length: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Ordinary phrases `[size, length]` of words drawn from ids `[W]`.

    Raises:
        ValueError: if there are no words.
    """
    if words.dim() != 1 or not len(words):
        raise ValueError(f"expected ids [W] of one word or more, got shape {tuple(words.shape)}")
    return words[torch.randint(len(words), (size, length), generator=generator).to(words.device)]
