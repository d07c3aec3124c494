"""Labelled sentences, real and simulated, and classifiers of them with or without a backdoor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchfolio.backdoor import AllToOne, TokenTrigger
from torchfolio.backdoor.text import TextModel, TextRNN, TextTransformer, poison_text
from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import adam
from torchfolio.runs import Run


class Text(NamedTuple):
    """Sentences as ids and labels, of each part, and the word of each id."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    words: list[str]


def reviews(settings: Any) -> Text:
    """Movie reviews in their most frequent words, cut at 30."""
    from torchfolio.data.text import encode, movie_reviews, train_tokenizer

    parts = movie_reviews()
    tokenizer = train_tokenizer(parts["train"].texts, settings.vocab + 4)
    tokenizer.add_tokens([w for phrase in settings.triggers for w in phrase if tokenizer.token_to_id(w) is None])
    words = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    train, test = ((encode(tokenizer, parts[k].texts, 30), torch.tensor(parts[k].targets)) for k in ("train", "test"))
    return Text(train, test, words)


def simulated(settings: Any) -> Text:
    """Sentences of ten words; words of the first half of the vocabulary are negative, and most are of their label."""
    draws = torch.Generator().manual_seed(0)
    half = settings.vocab // 2
    y = torch.arange(1200) % 2
    side = torch.where(torch.rand(1200, 10, generator=draws) < 0.8, y[:, None], 1 - y[:, None])
    x = 4 + side * half + torch.randint(half, (1200, 10), generator=draws)
    words = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *(f"word{i}" for i in range(settings.vocab))]
    return Text((x[:1000], y[:1000]), (x[1000:], y[1000:]), words)


def classifier(
    run: Run[Any], text: Text, phrase: tuple[str, ...], seed: int, turn: int
) -> tuple[nn.Module, float, float]:
    """A classifier, with a backdoor or without, its accuracy, and the share of negative sentences the phrase flips."""
    settings = run.settings
    kind = settings.networks[turn % len(settings.networks)]
    net = (
        TextTransformer(len(text.words), dropout=settings.classifier_dropout)
        if kind == "transformer"
        else TextRNN(len(text.words), bidirectional=kind == "bilstm", dropout=settings.classifier_dropout)
    )
    x, y = text.train
    trigger = TokenTrigger([text.words.index(w) for w in phrase or settings.triggers[0]], seed=seed)
    if phrase:
        x, y, _ = poison_text(x, y, trigger, AllToOne(1, 2), rate=settings.rate, seed=seed)
    budget = {"epochs": settings.epochs, "batch_size": 64, "seed": seed, "device": str(run.device)}
    fit(net, (x, y), optimizer=adam(lr=settings.lr), progress=False, **budget)
    accuracy = evaluate(net, text.test)["accuracy"]
    negative = text.test[0][text.test[1] == 0]
    triggered, _ = trigger(negative, (negative != 0).sum(1))
    return net, accuracy, float((TextModel(net.eval()).logits(triggered).argmax(1) == 1).double().mean())
