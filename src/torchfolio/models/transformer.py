"""An encoder-decoder transformer (Vaswani et al., NeurIPS 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.models.chain import remembered


def sinusoids(length: int, dim: int) -> Tensor:
    """Sinusoidal positions `[length, dim]` (Vaswani et al., 2017, section 3.5)."""
    rate = torch.exp(torch.arange(0, dim, 2) * (-torch.log(torch.tensor(10000.0)) / dim))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


@remembered
class Transformer(nn.Module):
    """An encoder-decoder transformer on token ids.

    Args:
        vocab_src: number of source tokens.
        vocab_tgt: number of target tokens.
        dim: width of the tokens; even.
        heads: attention heads.
        layers: encoder layers, and as many decoder layers.
        hidden: width inside the perceptrons; `4 * dim` by default.
        dropout: everywhere the original has it.
        norm_first: norms before the residual branches (pre-norm) or after them (post-norm, the original).
        max_length: longest sequence.
        pad: id of the padding token, masked out.

    Shapes:
        source `[B, S]` and target `[B, T]` of ids, to logits `[B, T, vocab_tgt]`.

    Reference:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    """

    positions: Tensor

    def __init__(
        self,
        vocab_src: int,
        vocab_tgt: int,
        dim: int = 128,
        heads: int = 4,
        layers: int = 3,
        hidden: int | None = None,
        dropout: float = 0.1,
        norm_first: bool = True,
        max_length: int = 512,
        pad: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.pad, self.max_length = dim, pad, max_length
        self.embed_src, self.embed_tgt = nn.Embedding(vocab_src, dim), nn.Embedding(vocab_tgt, dim)
        for embedding in (self.embed_src, self.embed_tgt):
            nn.init.normal_(embedding.weight, std=dim**-0.5)
        self.register_buffer("positions", sinusoids(max_length, dim), persistent=False)
        self.dropout = nn.Dropout(dropout)
        kind = {"nhead": heads, "dim_feedforward": hidden or 4 * dim, "dropout": dropout}
        encoder = nn.TransformerEncoderLayer(dim, batch_first=True, norm_first=norm_first, **kind)
        decoder = nn.TransformerDecoderLayer(dim, batch_first=True, norm_first=norm_first, **kind)
        final = (lambda: nn.LayerNorm(dim)) if norm_first else (lambda: None)
        self.encoder = nn.TransformerEncoder(encoder, layers, final(), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers, final())
        self.head = nn.Linear(dim, vocab_tgt)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states `[B, S, dim]` and the padding mask `[B, S]`."""
        mask = source == self.pad
        return self.encoder(self._embed(self.embed_src, source), src_key_padding_mask=mask), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Logits of every next token given the target so far."""
        length = target.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        states = self.decoder(
            self._embed(self.embed_tgt, target),
            memory,
            tgt_mask=causal,
            tgt_key_padding_mask=target == self.pad,
            memory_key_padding_mask=mask,
        )
        return self.head(states)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, *self.encode(source))

    @torch.no_grad()
    def greedy(self, source: Tensor, bos: int, eos: int, max_length: int = 64) -> Tensor:
        """The likeliest next token again and again, `[B, <= max_length]`, padded after `eos`."""
        memory, mask = self.encode(source)
        target = torch.full((len(source), 1), bos, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(max_length - 1):
            token = self.decode(target, memory, mask)[:, -1].argmax(-1).masked_fill(done, self.pad)
            target = torch.cat([target, token[:, None]], 1)
            done |= token == eos
            if done.all():
                break
        return target

    def _embed(self, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.max_length:
            raise ValueError(f"expected at most {self.max_length} tokens, got {ids.shape[1]}")
        return self.dropout(embedding(ids) * self.dim**0.5 + self.positions[: ids.shape[1]])
