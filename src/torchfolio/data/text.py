"""Sets of text, and a tokenizer for them.

`movie_reviews()` gives labelled sentences, `multi30k()` translated ones, `tiny_shakespeare()` one long text; all as
strings. `train_tokenizer` and `encode` make tensors of them, and `labelled` whole splits of token numbers.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.checks import at_least, one_of
from torchfolio.data.places import folder_of
from torchfolio.data.splits import Raw
from torchfolio.errors import require

__all__ = ["LABELLED", "SPECIAL", "Sentences", "encode", "labelled", "movie_reviews", "multi30k", "tiny_shakespeare",
           "train_tokenizer"]  # fmt: skip

LABELLED = {"movie_reviews": ("negative", "positive")}
"""Sets of labelled sentences, which `torchfolio.data.load` gives as token numbers, with the names of their classes."""
VOCABULARY, LENGTH = 8000, 64  # of the tokens of `labelled`

SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
"""Tokens 0 to 3 of every tokenizer of `train_tokenizer`: padding, unknown, begin and end of a sentence."""


@dataclass(frozen=True)
class Sentences:
    """Sentences of one split.

    Attributes:
        texts: sentences.
        targets: a label (int) or a translation (str) for each.
    """

    texts: tuple[str, ...]
    targets: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.texts)


def movie_reviews(*, root: str | Path | None = None) -> dict[str, Sentences]:
    """Sentences of film reviews, negative (0) and positive (1): `"train"` 8,530, `"val"` 1,066, `"test"` 1,066.

    The published set (rt-polarity) has no splits; these are drawn once and always the same.

    Args:
        root: folder to look in first.

    Raises:
        DataNotFound: if it is nowhere.
    """
    folder = folder_of("movie_reviews", "rt-polarity.pos", root)
    texts, labels = [], []
    for label, name in enumerate(("rt-polarity.neg", "rt-polarity.pos")):
        # Not `splitlines`: latin-1 has marks that it takes for ends of lines.
        lines = [line.strip() for line in (folder / name).read_text(encoding="latin-1").split("\n") if line.strip()]
        texts += lines
        labels += [label] * len(lines)
    order = np.random.default_rng(0).permutation(len(texts))
    tenth = len(texts) // 10
    parts = {"test": order[:tenth], "val": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    return {
        part: Sentences(tuple(texts[i] for i in parts[part]), tuple(labels[i] for i in parts[part]))
        for part in ("train", "val", "test")
    }


def labelled(name: str, *, root: str | Path | None = None) -> Raw:
    """A set of `LABELLED` as numbers of the words and marks that its training sentences have twice or more.

    Args:
        name: name of the set.
        root: folder to look in first.

    Raises:
        DataNotFound: if it is nowhere.
    """
    parts = {"movie_reviews": movie_reviews}[name](root=root)
    tokenizer = train_tokenizer(parts["train"].texts, VOCABULARY, min_count=2)
    tensors = {k: (encode(tokenizer, v.texts, LENGTH), torch.tensor(v.targets)) for k, v in parts.items()}
    words = tuple(tokenizer.id_to_token(k) for k in range(tokenizer.get_vocab_size()))
    return Raw(name, tensors["train"], tensors["test"], tensors["val"], LABELLED[name], vocabulary=words)


def multi30k(source: str = "en", target: str = "de", *, root: str | Path | None = None) -> dict[str, Sentences]:
    """Captions in English and German: `"train"` 29,000, `"val"` 1,014, `"test"` 1,000 (2016, flickr).

    Args:
        source: language of the sentences, `"en"` or `"de"`.
        target: language of their translations.
        root: folder to look in first.

    Raises:
        DataNotFound: if it is nowhere.
        ValueError: if a language is unknown or a file is torn.
    """
    one_of("source", source, ("en", "de"))
    one_of("target", target, ("en", "de"))
    folder = folder_of("multi30k", f"train.{source}.gz", root)

    def lines(part: str, language: str) -> tuple[str, ...]:
        with gzip.open(folder / f"{part}.{language}.gz", "rt", encoding="utf-8") as file:
            return tuple(line.strip() for line in file)

    parts = {}
    for part, name in (("train", "train"), ("val", "val"), ("test", "test_2016_flickr")):
        texts, translations = lines(name, source), lines(name, target)
        if len(texts) != len(translations):
            raise ValueError(
                f"{folder}: {name} has {len(texts)} sentences in {source} and {len(translations)} in {target}, "
                "expected as many"
            )
        parts[part] = Sentences(texts, translations)
    return parts


def tiny_shakespeare(*, root: str | Path | None = None) -> dict[str, str]:
    """1.1 million characters of plays: the first 90 % as `"train"`, then 5 % as `"val"` and 5 % as `"test"`.

    Raises:
        DataNotFound: if it is nowhere.
    """
    text = (folder_of("tiny_shakespeare", "input.txt", root) / "input.txt").read_text(encoding="utf-8")
    cuts = int(0.9 * len(text)), int(0.95 * len(text))
    return {"train": text[: cuts[0]], "val": text[cuts[0] : cuts[1]], "test": text[cuts[1] :]}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8000, *, model: str = "word", lowercase: bool = True, min_count: int = 1
) -> Any:
    """A tokenizer of the package `tokenizers`, trained on texts; tokens 0 to 3 are `SPECIAL`.

    Args:
        texts: texts to train on; never the test split.
        vocab_size: maximum number of tokens, special ones included.
        model: `"word"` (words and punctuation marks), `"bpe"` (byte pairs within words) or `"char"` (characters).
        lowercase: whether case is dropped; characters keep theirs where it is False.
        min_count: minimum number of times that a token occurs.

    Returns:
        A `tokenizers.Tokenizer`: `.encode(text).ids`, `.decode(ids)`, `.get_vocab_size()`.

    Raises:
        ValueError: if an argument is out of range.
    """
    one_of("model", model, ("word", "bpe", "char"))
    at_least("vocab_size", vocab_size, len(SPECIAL) + 1)
    at_least("min_count", min_count, 1)
    tokenizers = require("tokenizers", "text")
    models, trainers, splits = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    common = {"vocab_size": vocab_size, "special_tokens": list(SPECIAL), "show_progress": False}
    if model == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        trainer = trainers.BpeTrainer(**common, min_frequency=min_count)
        tokenizer.pre_tokenizer, tokenizer.decoder = splits.Metaspace(), tokenizers.decoders.Metaspace()
    else:
        tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
        trainer = trainers.WordLevelTrainer(**common, min_frequency=min_count)
        words = splits.Sequence([splits.WhitespaceSplit(), splits.Punctuation()])
        pattern = tokenizers.Regex(r"[\s\S]")
        tokenizer.pre_tokenizer = words if model == "word" else splits.Split(pattern, "isolated")
        if model == "char":
            tokenizer.decoder = tokenizers.decoders.Fuse()
    if lowercase:
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], length: int, *, ends: bool = False) -> Tensor:
    """Token numbers, int64 `[N, length]`: cut at `length`, padded with 0.

    Args:
        tokenizer: tokenizer of `train_tokenizer`.
        texts: N sentences.
        length: length of the rows.
        ends: whether every sentence begins with `[BOS]` and closes with `[EOS]`, which count.

    Raises:
        ValueError: if there is no text, or no room for a token.
    """
    at_least("length", length, 3 if ends else 1)
    if not len(texts):
        raise ValueError("expected at least one text, got none")
    rows = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, encoding in zip(rows, tokenizer.encode_batch(list(texts)), strict=True):
        ids = encoding.ids
        ids = [2, *ids[: length - 2], 3] if ends else ids[:length]
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return rows
