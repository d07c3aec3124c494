"""Judging candidates in one matrix, against one after the other, as a script would."""

from __future__ import annotations

from typing import Any

import torch

from torchfolio.backdoor import TokenTrigger
from torchfolio.backdoor.text import TextModel, TextRNN
from torchfolio.backdoor.text_generator import synthetic_corpus
from torchfolio.backdoor.tminer import mrs


def peers(bench: Any) -> None:
    torch.manual_seed(0)
    model = TextModel(TextRNN(804).eval())
    sentences = 4 + synthetic_corpus(100, 8, 800, torch.Generator().manual_seed(0))
    phrases = [tuple(row) for row in (4 + synthetic_corpus(60, 3, 800, torch.Generator().manual_seed(1))).tolist()]

    def one_by_one() -> list[float]:
        rates = []
        for phrase in phrases:
            hits = 0
            for row in sentences.tolist():
                hits += int(model.logits(torch.tensor([[*row[:4], *phrase, *row[4:]]])).argmax(1)[0] == 1)
            rates.append(hits / len(sentences))
        return rates

    def by_phrase() -> list[float]:
        trigger = [TokenTrigger(phrase) for phrase in phrases]
        lengths = torch.full((len(sentences),), sentences.shape[1])
        return [float((model.logits(t(sentences, lengths)[0]).argmax(1) == 1).double().mean()) for t in trigger]

    bench.compare("MRS of 60 candidates x 100", ours=lambda: mrs(model, phrases, sentences, 1), by_phrase=by_phrase,
                  one_by_one=one_by_one)  # fmt: skip
