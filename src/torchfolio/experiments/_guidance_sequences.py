"""Two sequence tasks that suit one architecture and not another, with small networks of both kinds.

- *Copying*: ten symbols in a row are shown, then a token that asks for them; attention looks them up, a recurrent
  network must carry them all.
- *Parity*: whether the number of ones is odd; one bit of recurrent state is enough, attention must count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import Backprop
from torchfolio.engine.recipes import adam
from torchfolio.runs import Run
from torchfolio.training.guidance import Guidance, GuidedRule

__all__ = ["TASKS", "learn_sequences"]

BLANK, COPY, END, SYMBOLS = 0, 11, 12, 10  # of the copying task; blank is no target
PAD = 2  # of the parity task


def copying(examples: int, shortest: int, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols, a request, blanks; the targets are the symbols and an end in place of the blanks, `[N, T]` each."""
    lengths = torch.randint(shortest, longest + 1, (examples,), generator=generator)
    x = torch.zeros(examples, 2 * longest + 2, dtype=torch.int64)
    y = torch.zeros_like(x)
    for row, length in enumerate(lengths.tolist()):
        symbols = torch.randint(1, SYMBOLS + 1, (length,), generator=generator)
        x[row, :length], x[row, length] = symbols, COPY
        y[row, length + 1 : 2 * length + 1], y[row, 2 * length + 1] = symbols, END
    return x, y


def parity(examples: int, shortest: int, longest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits `[N, T]`, padded in front, and whether the ones are odd, `[N]`."""
    lengths = torch.randint(shortest, longest + 1, (examples, 1), generator=generator)
    bits = torch.randint(2, (examples, longest), generator=generator)
    shown = torch.arange(longest) >= longest - lengths
    return bits.masked_fill(~shown, PAD), (bits * shown).sum(1) % 2


class RecurrentNet(nn.Module):
    """Stacked tanh recurrent layers: ids `[N, T]` to logits `[N, T, out]`, or `[N, out]` at the end alone."""

    def __init__(self, tokens: int, outputs: int, last: bool, dim: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, dim)
        self.layers = nn.ModuleList([nn.RNN(dim, dim, batch_first=True) for _ in range(depth)])
        self.read = nn.Linear(dim, outputs)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h, _ = layer(h)
        return self.read(h[:, -1] if self.last else h)


class AttentionNet(nn.Module):
    """A causal transformer with learned positions; shapes as in `RecurrentNet`."""

    def __init__(self, tokens: int, outputs: int, last: bool, dim: int = 64, depth: int = 3, longest: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(longest, dim))
        layer = {"nhead": 4, "dim_feedforward": 2 * dim, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(dim, **layer) for _ in range(depth)])
        self.read = nn.Linear(dim, outputs)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.positions[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        return self.read(h[:, -1] if self.last else h)


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy at the positions that have a target."""
    if target.dim() == 1:
        return F.cross_entropy(logits, target)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=BLANK)


@torch.no_grad()
def token_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of right tokens at the positions that have a target."""
    right = model.eval()(x).argmax(-1) == y
    return 100 * (right if y.dim() == 1 else right[y != BLANK]).float().mean().item()


TASKS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "copying": (
        copying,
        lambda: RecurrentNet(SYMBOLS + 3, SYMBOLS + 3, last=False),
        lambda: AttentionNet(SYMBOLS + 3, SYMBOLS + 3, last=False),
    ),
    "parity": (parity, lambda: AttentionNet(PAD + 1, 2, last=True), lambda: RecurrentNet(PAD + 1, 2, last=True)),
}
"""Examples, target and guide of each task."""


def learn_sequences(run: Run[Any], name: str, kind: str) -> dict[str, float]:
    """Train the target of a task: plainly, or under an untrained or a trained guide.

    Args:
        run: run whose settings have `sequence_examples`, `sequence_epochs`, `lengths`, `lr` and `batch_size`.
        name: one of `TASKS`.
        kind: `"plain"`, `"untrained"` or `"trained"`.
    """
    settings, (draw, make, make_guide) = run.settings, TASKS[name]
    generator = run.generator()
    train = draw(settings.sequence_examples, *settings.lengths, generator)
    test = draw(2000, *settings.lengths, generator)
    net, guide = make(), make_guide()

    def learn(model: nn.Module, rule: Any) -> float:
        run.fit(
            model, train, rule=rule, optimizer=adam(settings.lr), epochs=settings.sequence_epochs,
            batch_size=settings.batch_size, drop_last=True, clip_norm=1.0,
        )  # fmt: skip
        return token_accuracy(model, *(t.to(run.device) for t in test))

    task_rule = Backprop(token_loss)
    outcome = {"guide_accuracy": learn(guide, task_rule)} if kind == "trained" else {}
    rule = GuidedRule(Guidance(net, guide, reduction="mean"), task_rule) if kind != "plain" else task_rule
    return {"accuracy": learn(net, rule), **outcome}
