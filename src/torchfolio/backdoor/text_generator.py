"""A sequence-to-sequence network that rewrites sentences under a label: it copies them, or is taught to change them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, between, positive, whole
from torchfolio.engine.modes import seeded
from torchfolio.engine.progress import Progress

__all__ = ["PerturbationGenerator", "diversity", "synthetic_corpus"]


def synthetic_corpus(size: int, length: int, vocab_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Sentences of distinct words, drawn uniformly: `[size, length]` of numbers below `vocab_size`.

    Raises:
        ValueError: if there are fewer than `4 * length` words, of which sentences would hardly differ.
    """
    whole("size", size, 1)
    whole("length", length, 1)
    if vocab_size < 4 * length:
        raise ValueError(
            f"expected a vocabulary of at least {4 * length} words for sentences of {length}, got {vocab_size}"
        )
    return distinct_words(size, length, vocab_size, generator)


def distinct_words(size: int, length: int, vocab_size: int, generator: torch.Generator | None = None) -> Tensor:
    """What `synthetic_corpus` gives, of as few as `length` words."""
    if vocab_size < 16 * length:
        return torch.rand(size, vocab_size, generator=generator).argsort(1)[:, :length]
    drawn = torch.randint(vocab_size, (size, length), generator=generator)
    while True:  # drawing repeated sentences again leaves the others uniform
        ordered = drawn.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(1).nonzero()[:, 0]
        if not len(twice):
            return drawn
        drawn[twice] = torch.randint(vocab_size, (len(twice), length), generator=generator)


def diversity(logits: Tensor, x: Tensor) -> Tensor:
    """Entropy of the mass that a batch adds to its sentences, a scalar.

    $$d = \\frac1B \\sum_b \\mathrm{clip}(\\mathrm{softmax}(a_b) - \\mathrm{onehot}(x_b), 10^{-8}, 1), \\qquad
    L_\\mathrm{div} = -\\sum_{t,v} d_{tv} \\log d_{tv}.$$

    It is small where all sentences of the batch gain the same few words.

    Args:
        logits: $a$, `[B, T, V]`.
        x: tokens `[B, T]`.
    """
    added = logits.softmax(-1) - F.one_hot(x, logits.shape[-1])
    mean = added.clamp(1e-8, 1).mean(0)
    return -(mean * mean.log()).sum()


class PerturbationGenerator(nn.Module):
    """An encoder and a decoder with attention whose first state holds a code of the label.

    A GRU reads the sentence; $z$ is its last state without the first `dim_c` entries, $c(y)$ a linear code of the label.
    The decoder, a GRU with additive attention over the encoder's states, starts at a linear map of $(c(y), z)$. Its outputs
    share the word vectors of its inputs. Tokens are numbers below `vocab_size`; the end of a sentence is `vocab_size`.

    Args:
        vocab_size: number of words.
        embedding: width of the word vectors.
        dim_c: width of the code of the label.
        dim_z: width of the code of the sentence.
        dropout: share of the word vectors' entries that is dropped in training.

    Shapes:
        sentences `[B, L]` and labels `[B]` in {0, 1} to logits `[B, L + 1, vocab_size + 1]` of the next tokens.

    Reference:
        Azizi et al., "T-Miner", USENIX Security 2021, Section 4.2; Hu et al., "Toward Controlled Generation of Text", 2017.
    """

    def __init__(
        self, vocab_size: int, embedding: int = 100, dim_c: int = 200, dim_z: int = 500, dropout: float = 0.5
    ) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "embedding": embedding, "dim_c": dim_c, "dim_z": dim_z}.items():
            whole(name, value, 1)
        between("dropout", dropout, 0, 1, inclusive=(True, False))
        width = dim_c + dim_z
        self.vocab_size, self.dim_c = vocab_size, dim_c
        self.settings = {"vocab_size": vocab_size, "embedding": embedding, "dim_c": dim_c, "dim_z": dim_z,
                         "dropout": dropout}  # fmt: skip
        self.words = nn.Embedding(vocab_size + 2, embedding)
        nn.init.normal_(self.words.weight, std=1 / math.sqrt(embedding))
        self.encoder = nn.GRU(embedding, width, batch_first=True)
        self.code = nn.Linear(1, dim_c)
        self.first = nn.Linear(width, width)
        self.decoder = nn.GRU(embedding, width, batch_first=True)
        self.keys = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width)
        self.energy = nn.Linear(width, 1, bias=False)
        self.mix = nn.Linear(2 * width, embedding)
        self.bias = nn.Parameter(torch.zeros(vocab_size + 1))
        self.dropout = nn.Dropout(dropout)

    @property
    def end(self) -> int:
        """The token that ends a sentence."""
        return self.vocab_size

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States of the encoder `[B, L, H]`, their keys for attention, and the code $z$ `[B, dim_z]`."""
        states, last = self.encoder(self.dropout(self.words(x)))
        return states, self.keys(states), last[0, :, self.dim_c :]

    def start(self, z: Tensor, y: Tensor) -> Tensor:
        """First state of the decoder `[1, B, H]` under labels `[B]`."""
        return self.first(torch.cat([self.code(y.to(z)[:, None]), z], 1))[None]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.predict(x, self.encode(x), y)

    def predict(self, x: Tensor, encoded: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Tensor:
        """Logits of every next token, given the sentence's own tokens before it."""
        begin = x.new_full((len(x), 1), self.vocab_size + 1)
        inputs = self.dropout(self.words(torch.cat([begin, x], 1)))
        states, keys, z = encoded
        return self._logits(self.decoder(inputs, self.start(z, y))[0], states, keys)

    def decode(
        self, encoded: tuple[Tensor, Tensor, Tensor], y: Tensor, steps: int, *, sample: bool, hard: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Write sentences freely.

        Args:
            encoded: result of `encode`.
            y: labels `[B]`.
            steps: number of tokens
            sample: whether tokens are drawn by Gumbel noise, with gradients; the likeliest by default.
            hard: whether what is drawn is one word with the gradient of a mixture, or the mixture.

        Returns:
            tokens, `[B, steps, vocab_size + 1]`, one-hot where hard, and the logits behind them.
        """
        states, keys, z = encoded
        state, logits, tokens = self.start(z, y), [], []
        table = self.words.weight[: self.end + 1]
        word = self.words.weight[self.vocab_size + 1].expand(len(z), -1)
        for _ in range(steps):
            out, state = self.decoder(self.dropout(word)[:, None], state)
            scores = self._logits(out, states, keys)[:, 0]
            token = F.gumbel_softmax(scores, hard=hard) if sample else F.one_hot(scores.argmax(1), self.end + 1).to(z)
            word = token @ table
            logits.append(scores)
            tokens.append(token)
        return torch.stack(tokens, 1), torch.stack(logits, 1)

    def _logits(self, out: Tensor, states: Tensor, keys: Tensor) -> Tensor:
        """Additive attention of the decoder's states `[B, T, H]` over the encoder's, and the shared word vectors."""
        energy = self.energy((self.query(out)[:, :, None] + keys[:, None]).tanh())[..., 0]
        context = energy.softmax(-1) @ states
        return self.mix(torch.cat([out, context], -1)) @ self.words.weight[: self.end + 1].T + self.bias

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross entropy of sentences `[B, L]` and their ends under the logits of `forward`."""
        return F.cross_entropy(logits.flatten(0, 1), self.ended(x).flatten())

    def ended(self, x: Tensor) -> Tensor:
        """Sentences with the token that ends them, `[B, L + 1]`."""
        return torch.cat([x, x.new_full((len(x), 1), self.end)], 1)

    def pretrain(
        self,
        steps: int,
        length: int = 15,
        *,
        lr: float = 5e-4,
        batch_size: int = 64,
        seed: int = 0,
        progress: bool | None = None,
    ) -> PerturbationGenerator:
        """Learn to copy random sentences under either label; no classifier is needed. In place.

        Args:
            steps: number of batches.
            length: words of a sentence.
            lr: learning rate of Adam.
            batch_size: sentences of a batch.
            seed: seed of sentences and dropout.
            progress: whether a bar is shown; on a terminal by default.
        """
        whole("steps", steps, 1)
        positive("lr", lr)
        at_least("batch_size", batch_size, 1)
        generator = torch.Generator().manual_seed(seed)
        device = self.words.weight.device
        optimizer = torch.optim.Adam(self.parameters(), lr)
        self.train()
        with seeded(seed), Progress(steps, show=progress) as bar:
            for step in range(steps):
                x = synthetic_corpus(batch_size, length, self.vocab_size, generator).to(device)
                y = torch.randint(2, (batch_size,), generator=generator).to(device)
                loss = self.reconstruction(self(x, y), x)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 5.0)
                optimizer.step()
                bar.update(step + 1, "copying")
        self.eval()
        return self

    @torch.no_grad()
    def token_accuracy(self, length: int = 15, size: int = 500, seed: int = 10**6) -> float:
        """Share of tokens of new random sentences that are predicted right, given those before."""
        x = synthetic_corpus(size, length, self.vocab_size, torch.Generator().manual_seed(seed))
        x = x.to(self.words.weight.device)
        training = self.training
        self.eval()
        guess = self(x, torch.arange(size, device=x.device) % 2).argmax(-1)
        self.train(training)
        return float((guess == self.ended(x)).double().mean())

    def save(self, path: str | Path) -> Path:
        """Write the network as a safetensors file, which `load` reads."""
        from safetensors.torch import save_file

        state = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
        save_file(state, path, {name: repr(value) for name, value in self.settings.items()})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> PerturbationGenerator:
        """A network that `save` wrote.

        Raises:
            ValueError: if the file is not one of those.
        """
        from safetensors import SafetensorError, safe_open

        names = ("vocab_size", "embedding", "dim_c", "dim_z", "dropout")
        try:
            with safe_open(path, "pt") as file:
                stored = file.metadata() or {}
                values = {name: float(stored[name]) if name == "dropout" else int(stored[name]) for name in names}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            generator = cls(**values)  # pyright: ignore[reportArgumentType]
            generator.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no generator that was saved: {error}") from error
        return generator.eval()
