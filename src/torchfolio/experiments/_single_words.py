"""What is found without a generator: every word tried by itself, and random words put into sentences."""

from __future__ import annotations

import torch
from torch import nn

from torchfolio.backdoor.text import TextModel
from torchfolio.backdoor.text_generator import synthetic_corpus
from torchfolio.backdoor.tminer import mrs
from torchfolio.experiments._text_victims import Text


def base_rate(net: nn.Module, text: Text, length: int) -> float:
    """How often random words put in the place of a source sentence's last three flip it."""
    plain = [i for i in range(4, len(text.words)) if text.words[i] != "."]
    rows = torch.tensor(plain)[synthetic_corpus(2000, length, len(plain), torch.Generator().manual_seed(1))]
    model = TextModel(net)
    rows = rows[model.logits(rows).argmax(1) == 0]
    changed = torch.cat([rows[:, :-3], rows.roll(1, 0)[:, :3]], 1)
    return float((model.logits(changed).argmax(1) == 1).double().mean())


def exhaustive(net: nn.Module, text: Text, phrase: tuple[str, ...], length: int) -> int:
    """The baseline for triggers of one word: how many other words have a higher misclassification rate."""
    plain = torch.tensor([i for i in range(4, len(text.words)) if text.words[i] != "."])
    model, draws = TextModel(net), torch.Generator().manual_seed(2)
    rows = plain[synthetic_corpus(400, length, len(plain), draws)]
    rows = rows[model.logits(rows).argmax(1) == 0][:40]
    rates = mrs(model, [(int(i),) for i in plain[:2000]], rows, 1, generator=draws)
    own = [rates[plain == text.words.index(w)] for w in phrase if text.words.index(w) < 2000]
    return int((rates > torch.cat(own).max()).sum()) if own else -1
