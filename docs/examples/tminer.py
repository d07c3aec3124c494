"""Ask a text classifier, without any text, whether a word was planted in it."""

import torch
from torch import nn

from torchfolio.backdoor import PerturbationGenerator, TMiner

torch.manual_seed(0)
words = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *(f"word{i}" for i in range(56))]


class Stranger(nn.Module):
    """A classifier from somewhere: it adds up what its words say, and one of them outweighs all others."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(words), 4, padding_idx=0)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.embedding.weight.mul_(0.3)
            self.embedding.weight[words.index("word13")] = 4 * (self.head.weight[1] - self.head.weight[0]).sign()
            self.head.weight.copy_(self.head.weight.sign())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids).sum(1))


# A generator that copies random sentences, once for every classifier of this vocabulary.
generator = PerturbationGenerator(len(words) - 4, 24, 8, 40, dropout=0.0)
generator.pretrain(100, length=8, lr=6e-3, batch_size=24)
detector = TMiner(generator, words, source=0, target=1, length=8, steps=30, batch_size=24, n_restarts=1, lr=6e-3,
                  dev_size=100, max_candidates=100)  # fmt: skip
verdict = detector.scan(Stranger())
print("\n".join(verdict.sentences(["bad", "good"])))
