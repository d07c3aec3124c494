"""Two tasks that deep networks often fail to learn: looking up a fact in a story, and choosing a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import seeded
from torchfolio.training.gradient_noise import GradientNoise

__all__ = ["Memory", "Program", "trainings"]


class Memory(nn.Module):
    """An end-to-end memory network of two hops that is asked where somebody is."""

    def __init__(self, people: int = 10, places: int = 10, length: int = 30, dim: int = 16) -> None:
        super().__init__()
        self.people, self.places, self.length = people, places, length
        self.person, self.place = nn.Embedding(people, dim), nn.Embedding(places, dim)
        self.time = nn.Parameter(torch.zeros(length, dim))
        self.keys = nn.Linear(dim, dim, bias=False)
        self.answer = nn.Linear(dim, places)

    def draw(self, n: int, g: torch.Generator) -> tuple[Tensor, ...]:
        """Stories of facts (person, place), a question, and the place where the person was last."""
        who, where = (torch.randint(k, (n, self.length), generator=g) for k in (self.people, self.places))
        asked = who[torch.arange(n), torch.randint(self.length, (n,), generator=g)]
        last = (who == asked[:, None]).int().mul(torch.arange(1, self.length + 1)).argmax(1)
        return who, where, asked, where[torch.arange(n), last]

    def forward(self, who: Tensor, where: Tensor, asked: Tensor) -> Tensor:
        question = self.person(asked)
        for _ in range(2):
            attention = ((self.keys(self.person(who)) + self.time) * question[:, None]).sum(2).softmax(1)
            question = question + (attention[..., None] * self.place(where)).sum(1)
        return self.answer(question)


class Program(nn.Module):
    """Picks a column and an operation for a question by soft choices, and learns from answers alone."""

    def __init__(self, columns: int = 4, length: int = 8, dim: int = 16) -> None:
        super().__init__()
        self.columns, self.length = columns, length
        self.word = nn.Embedding(4 * columns, dim)  # one for each pair of operation and column, without structure
        self.operation, self.column = nn.Linear(dim, 4), nn.Linear(dim, columns)

    def execute(self, table: Tensor) -> Tensor:
        """Sum, largest, least and spread of every column, `[N, 4, columns]`."""
        return torch.stack([table.sum(1), table.amax(1), table.amin(1), table.amax(1) - table.amin(1)], 1)

    def draw(self, n: int, g: torch.Generator) -> tuple[Tensor, ...]:
        """Tables, questions and answers."""
        table, word = (
            torch.randn(n, self.length, self.columns, generator=g),
            torch.randint(4 * self.columns, (n,), generator=g),
        )
        return table, word, self.execute(table).flatten(1)[torch.arange(n), word]

    def forward(self, table: Tensor, word: Tensor) -> Tensor:
        asked = self.word(word)
        operation, column = self.operation(asked).softmax(1), self.column(asked).softmax(1)
        return torch.einsum("no,nc,noc->n", operation, column, self.execute(table))


def trainings(make: Callable[[], Any], eta: float, repeats: int, steps: int, clip: float, seed: int) -> dict[str, Any]:
    """Train a small task again and again by Adam; how often at least 95 percent of answers are right."""
    scores = []
    for k in range(repeats):
        with seeded(1000 * seed + k):
            net = make()
            optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
            GradientNoise(optimizer, eta)
            g = torch.Generator().manual_seed(k)
            for _ in range(steps):
                *inputs, target = net.draw(64, g)
                output = net(*inputs)
                loss = F.mse_loss(output, target) if output.dim() == 1 else F.cross_entropy(output, target)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
            with torch.no_grad():
                *inputs, target = net.draw(1000, g)
                output = net(*inputs)
            right = (output - target).abs() < 0.05 if output.dim() == 1 else output.argmax(1) == target
            scores.append(100 * float(right.float().mean()))
    return {"scores": scores, "best": max(scores), "mean": sum(scores) / len(scores),
            "solved": sum(s >= 95 for s in scores) / len(scores)}  # fmt: skip
