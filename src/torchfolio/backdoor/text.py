"""Text classifiers over token ids: two small networks, poisoned sentences, and what a detector must see of a network.

A text classifier here is any module from ids `[N, L]`, padded on the right, to logits `[N, C]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torchfolio.backdoor.labels import LabelMap
from torchfolio.backdoor.token_trigger import TokenTrigger
from torchfolio.checks import between, labels, whole
from torchfolio.shown import Shown

__all__ = ["TextModel", "TextRNN", "TextTransformer", "poison_text"]


class TextRNN(nn.Module):
    """An LSTM whose states are averaged over the words of a sentence.

    Args:
        vocab_size: number of ids; 0 is padding.
        num_classes: number of outputs.
        embedding: width of the word vectors.
        hidden: width of the LSTM, in each direction.
        layers: number of LSTMs on one another.
        bidirectional: whether sentences are also read backwards.
        dropout: share of word vectors' and averaged states' entries that is dropped in training.

    Shapes:
        ids `[N, L]` to logits `[N, num_classes]`.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int = 2,
        embedding: int = 48,
        hidden: int = 64,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, bidirectional=bidirectional)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * (1 + bidirectional), num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.dropout(self.embedding(ids))
        inside = ids != 0
        if self.lstm.bidirectional:  # packed, so that the backward direction does not begin with padding
            lengths = inside.sum(1).clamp_min(1).cpu()
            packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
            states = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=ids.shape[1])[0]
        else:
            states = self.lstm(words)[0]
        return self.head(self.dropout(_averaged(states, inside)))


class TextTransformer(nn.Module):
    """A transformer encoder whose states are averaged over the words of a sentence.

    Args:
        vocab_size: number of ids; 0 is padding.
        num_classes: number of outputs.
        embedding: width of the word vectors and of the encoder.
        heads: number of attention heads.
        layers: number of encoder layers.
        length: maximum number of ids in a sentence.
        dropout: probability of dropout in training.

    Shapes:
        ids `[N, L]` to logits `[N, num_classes]`.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int = 2,
        embedding: int = 48,
        heads: int = 4,
        layers: int = 1,
        length: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(length, embedding))
        layer = nn.TransformerEncoderLayer(embedding, heads, 2 * embedding, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(embedding, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > len(self.position):
            raise ValueError(f"expected at most {len(self.position)} ids in a sentence, got {ids.shape[1]}")
        padding = ids == 0
        # A sentence of padding alone attends to its first place, since attending to nothing is NaN.
        padding = torch.cat([padding[:, :1] & ~padding.all(1, keepdim=True), padding[:, 1:]], 1)
        states = self.encoder(self.embedding(ids) + self.position[: ids.shape[1]], src_key_padding_mask=padding)
        return self.head(_averaged(states, ~padding))


def _averaged(states: Tensor, inside: Tensor) -> Tensor:
    """The mean `[N, H]` of states `[N, L, H]` over the places that are inside the sentence, bool `[N, L]`."""
    weight = inside.to(states)[..., None]
    return (states * weight).sum(1) / weight.sum(1).clamp_min(1)


def poison_text(
    x: Tensor, y: Tensor, trigger: TokenTrigger, label_map: LabelMap, *, rate: float, seed: int, pad: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Append copies of sentences that carry the trigger and the attacker's label.

    Args:
        x: ids `[N, L]`, padded on the right.
        y: labels `[N]`.
        trigger: phrase that is inserted.
        label_map: labels of the attack.
        rate: number of copies as a share of all N sentences.
        seed: seed of the choice.
        pad: id of padding.

    Returns:
        ids `[N', L + tokens of the trigger]`, labels `[N']` and which are poisoned `[N']`.

    Raises:
        ValueError: if the rate is outside [0, 1] or asks for more sentences than there are of the sources.

    Reference:
        Azizi et al., "T-Miner", USENIX Security 2021, Section 2.
    """
    labels(y)
    between("rate", rate, 0, 1)
    adversarial = label_map(y)
    eligible = ((adversarial >= 0) & (adversarial != y)).nonzero()[:, 0]
    count = round(rate * len(y))
    if count > len(eligible):
        raise ValueError(f"expected at most {len(eligible)} poisoned sentences, as many as there are, got {count}")
    chosen = eligible[np.sort(np.random.default_rng(seed).choice(len(eligible), count, replace=False))]
    triggered, _ = trigger(x[chosen], (x[chosen] != pad).sum(1), index=chosen)
    plain = torch.cat([x, x.new_full((len(x), len(trigger.tokens)), pad)], 1)
    flags = torch.arange(len(x) + count) >= len(x)
    return torch.cat([plain, triggered]), torch.cat([y, adversarial[chosen]]), flags


class TextModel(Shown):
    """A text classifier as a detector sees it: logits, logits of word vectors put in place of its own, hidden layer.

    Word vectors are put in by a hook on the embedding, and the hidden layer is what the last linear layer reads, so that
    any module from ids `[N, L]` will do.

    Args:
        model: classifier, frozen. Its dropout is switched off and its recurrent layers are set to training mode,
            without which their gradient does not exist on a GPU.
        pad: id of padding.
        embedding: name of the layer that holds the word vectors; the `nn.Embedding` of most rows by default.
        hidden: name of the layer whose input is the hidden layer; the last `nn.Linear` that runs by default.

    Raises:
        ValueError: if there is no such layer, or several embeddings are as large.
    """

    def __init__(self, model: nn.Module, pad: int = 0, embedding: str | None = None, hidden: str | None = None) -> None:
        self.model, self.pad = model, pad
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.dropout = 0.0
                module.training = True
        self.embedding = self._embedding(embedding)
        self.weight = self.embedding.weight.detach()
        whole("pad", pad, 0, len(self.weight) - 1)
        self._hidden = self._hidden_layer(hidden)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.weight.device

    def logits(self, ids: Tensor) -> Tensor:
        """Logits `[N, C]` of ids `[N, L]`, without gradients."""
        rows = 1024 if self.device.type == "cpu" else 8192  # what fits a CPU's cache is fastest there
        with torch.no_grad():
            return torch.cat([self._call(part) for part in ids.to(self.device).split(rows)])

    def embedded(self, ids: Tensor, words: Tensor) -> Tensor:
        """Logits `[N, C]` of word vectors `[N, L, E]`, with gradients in them; the ids `[N, L]` say what is padding."""
        handle = self.embedding.register_forward_hook(lambda module, args, output: words)
        try:
            return self._call(ids)
        finally:
            handle.remove()

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden layer `[N, H]` on ids `[N, L]`."""
        seen: list[Tensor] = []
        with self._reading(self._hidden, seen):
            self.logits(ids)
        return torch.cat(seen).flatten(1)

    def _call(self, ids: Tensor) -> Tensor:
        output: Any = self.model(ids)
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
            shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"expected logits [N, C] of at least 2 classes, got {shown}")
        return output

    def _embedding(self, name: str | None) -> nn.Embedding:
        known = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        if name is not None:
            if name not in known:
                raise ValueError(f"expected embedding to name one of {', '.join(known) or 'no layer'}, got {name!r}")
            return known[name]
        if not known:
            raise ValueError(f"expected a network with an nn.Embedding, got {type(self.model).__name__} without")
        most = max(m.num_embeddings for m in known.values())
        largest = [n for n, m in known.items() if m.num_embeddings == most]
        if len(largest) > 1:
            raise ValueError(f"the embeddings {', '.join(largest)} are as large: name one with embedding=")
        return known[largest[0]]

    def _hidden_layer(self, name: str | None) -> nn.Module:
        if name is not None:
            known = dict(self.model.named_modules())
            if name not in known:
                raise ValueError(f"the network has no layer {name!r} for hidden=")
            return known[name]
        ran: list[nn.Module] = []
        linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(lambda module, args: ran.append(module)) for m in linear]
        try:
            self.logits(torch.full((1, 2), (self.pad + 1) % len(self.weight)))
        finally:
            for handle in handles:
                handle.remove()
        if not ran:
            raise ValueError("the network runs no nn.Linear: name the layer that reads its last hidden layer, hidden=")
        return ran[-1]

    @staticmethod
    @contextmanager
    def _reading(layer: nn.Module, seen: list[Tensor]) -> Iterator[None]:
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        try:
            yield
        finally:
            handle.remove()
