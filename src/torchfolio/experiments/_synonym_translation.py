"""A simulated translation: every symbol has two synonyms, some targets are noise, and valid outputs are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import Backprop
from torchfolio.engine.recipes import adam
from torchfolio.insight.utility_probability import fit_temperature, mbr_decision, rational_choice, sample_sequences
from torchfolio.runs import Run

SYMBOLS, SEP, EOS, FIRST = 20, 1, 2, 3  # tokens: 0 padding, 3 to 22 the source, 23 to 62 its synonyms in pairs
TARGETS, VOCABULARY, LONGEST = FIRST + SYMBOLS, FIRST + 3 * SYMBOLS, 10


class Decoder(nn.Module):
    """A pre-norm transformer that predicts the next token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, dim), nn.Parameter(0.02 * torch.randn(2 * LONGEST + 2, dim))
        block = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        hidden = self.blocks(self.token(ids) + self.place[: ids.shape[1]], mask=mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)


def sentences(count: int, length: Tensor, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source, separator, target, end `[N, 22]`, and the next tokens of the target part, -100 elsewhere."""
    source = torch.randint(SYMBOLS, (count, LONGEST), generator=generator)
    second = torch.rand(count, LONGEST, generator=generator) < 0.4
    target = TARGETS + 2 * source + second
    spoiled = torch.rand(count, LONGEST, generator=generator) < noise
    anything = torch.randint(TARGETS, VOCABULARY, (count, LONGEST), generator=generator)
    target = torch.where(spoiled, anything, target)
    ids = torch.zeros(count, 2 * LONGEST + 2, dtype=torch.int64)
    for n in range(5, LONGEST + 1):
        rows = length == n
        ids[rows, :n], ids[rows, n] = source[rows, :n] + FIRST, SEP
        ids[rows, n + 1 : 2 * n + 1], ids[rows, 2 * n + 1] = target[rows, :n], EOS
    following = ids.roll(-1, 1)
    places = torch.arange(ids.shape[1])
    following[(places < length[:, None]) | (places > 2 * length[:, None])] = -100
    return ids, following


def trained(run: Run[Any]) -> Decoder:
    """The transformer, trained by maximum likelihood."""
    generator = run.generator()
    count = 64 * run.settings.steps
    length = torch.randint(5, LONGEST + 1, (count,), generator=generator)
    torch.manual_seed(run.seed)
    net = Decoder(run.settings.dim)
    pairs = sentences(count, length, run.settings.noise, generator)
    run.fit(net, pairs, rule=Backprop(F.cross_entropy), optimizer=adam(2e-3), epochs=1, batch_size=64)
    return net


class Translations:
    """Sources of one length for every row, decoded in one batch, and what is valid of the outputs."""

    def __init__(self, net: nn.Module, run: Run[Any], seed: int) -> None:
        self.net, self.length, self.seed, self.device = net.eval(), 8, seed, run.device
        generator = torch.Generator().manual_seed(seed)
        length = torch.full((run.settings.inputs,), self.length)
        self.ids, self.following = sentences(run.settings.inputs, length, run.settings.noise, generator)
        self.prefix = self.ids[:, : self.length + 1].to(run.device)
        self.symbols = self.prefix[:, :-1] - FIRST

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)[..., -1]

    def decode(self, kappa: float | list[float]) -> Tensor:
        """Outputs `[..., N, 9]`, at one rationality or at several in one batch; the same random numbers each time."""
        kappas = kappa if isinstance(kappa, list) else [kappa]
        row = torch.tensor(kappas).repeat_interleave(len(self.prefix)).to(self.device)
        prefix = self.prefix.repeat(len(kappas), 1)
        generator = torch.Generator(device=self.device).manual_seed(self.seed)
        drawn = sample_sequences(self.step, prefix, EOS, self.length + 1, rationality=row, generator=generator)
        drawn = F.pad(drawn, (0, self.length + 1 - drawn.shape[1])).view(len(kappas), *self.prefix.shape[:1], -1)
        return drawn if isinstance(kappa, list) else drawn[0]

    def valid(self, outputs: Tensor) -> Tensor:
        """Which outputs, of the first sources, are a synonym for every symbol, and then the end."""
        words, end = outputs[..., :-1], outputs[..., -1]
        right = ((words - TARGETS) // 2 == self.symbols[: outputs.shape[-2]]).all(-1)
        return right & (words >= TARGETS).all(-1) & (end == EOS)

    def validity(self, kappa: float) -> float:
        return float(self.valid(self.decode(kappa)).double().mean())

    def second(self, outputs: Tensor) -> float:
        """Share of the second synonym among the words of valid outputs."""
        words = outputs[self.valid(outputs)][:, :-1]
        return float(((words - TARGETS) % 2).double().mean()) if len(words) else 0.0

    @torch.no_grad()
    def loss(self, kappa: float) -> float:
        """Held-out log loss of a target token, nats, with the noise of training."""
        choice = rational_choice(self.net(self.ids.to(self.device)), kappa, dim=1)
        return float(F.nll_loss(choice, self.following.to(self.device), ignore_index=-100))

    @torch.no_grad()
    def likely(self) -> float:
        """The rationality of the highest likelihood."""
        logits = self.net(self.ids.to(self.device)).transpose(1, 2).flatten(0, 1)
        return fit_temperature(logits.cpu(), self.following.flatten())

    def risk(self, kappa: float, inputs: int) -> float:
        """Validity of minimum-risk outputs over 16 samples."""
        generator = torch.Generator(device=self.device).manual_seed(self.seed + 1)
        prefix = self.prefix[:inputs].repeat_interleave(16, 0)
        drawn = sample_sequences(self.step, prefix, EOS, self.length + 1, rationality=kappa, generator=generator)
        drawn = F.pad(drawn, (0, self.length + 1 - drawn.shape[1])).view(inputs, 16, -1)
        chosen = torch.stack([rows[mbr_decision([tuple(r.tolist()) for r in rows], overlap)] for rows in drawn])
        return float(self.valid(chosen).double().mean())


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """One less the edit distance over the longer length; outputs end at their first end token."""
    a, b = (c[: c.index(EOS) + 1] if EOS in c else c for c in (a, b))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return 1 - row[-1] / max(len(a), len(b))
