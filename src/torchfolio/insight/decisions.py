"""Rules by which scores become outputs: by their order (argmax, beams) or by their numbers (sampling, minimum risk).

Sequences come from any callable `step(tokens [B, T]) -> logits [B, V]` of the next token: a transformer, an n-gram.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import finite, positive, same_length, whole

__all__ = [
    "Beam",
    "argmax_decision",
    "beam_search",
    "mbr_decision",
    "rational_choice",
    "sample_decision",
    "sample_sequences",
]

Step = Callable[[Tensor], Tensor]


def rational_choice(logits: Tensor, rationality: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    """Log-probabilities of a chooser of rationality $\\kappa$: $\\log \\operatorname{softmax}(\\kappa u)$.

    Luce's choice rule, or utilities with Gumbel noise of scale $1/\\kappa$: $\\kappa = 1$ is the usual reading of a
    network, $\\kappa \\to \\infty$ picks the best, $\\kappa \\to 0$ anything. On the logits of every step of a sequence this
    is another distribution than on the totals of whole sequences.

    Args:
        logits: utilities `[...]`.
        rationality: $\\kappa > 0$, a number or a tensor that broadcasts.
        dim: dimension of the alternatives.

    Raises:
        ValueError: if $\\kappa$ is not positive and finite, or a utility is NaN. One of $-\\infty$ is never chosen.
    """
    logits = _no_nan(logits)
    if isinstance(rationality, Tensor):
        if not bool((finite("rationality", rationality) > 0).all()):
            raise ValueError(f"expected rationality above 0, got {float(rationality.min())}")
    else:
        positive("rationality", rationality)
    return (logits * rationality).log_softmax(dim)


def _no_nan(logits: Tensor) -> Tensor:
    logits = torch.as_tensor(logits)
    if bool(logits.isnan().any()):
        raise ValueError(f"expected utilities, got NaN in {int(logits.isnan().sum())} of {logits.numel()}")
    return logits


def _next(step: Step, tokens: Tensor) -> Tensor:
    """Logits of the next token, checked."""
    logits = step(tokens)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(tokens):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected step to give logits [{len(tokens)}, V] of the next token, got {shape}")
    return logits


def _prefix(prefix: Tensor, dims: int) -> Tensor:
    if not isinstance(prefix, Tensor) or prefix.dim() != dims or prefix.is_floating_point() or not prefix.numel():
        got = f"{prefix.dtype} {tuple(prefix.shape)}" if isinstance(prefix, Tensor) else type(prefix).__name__
        raise ValueError(f"expected prefix to be token numbers {'[P]' if dims == 1 else '[B, P]'}, got {got}")
    return prefix


def argmax_decision(logits: Tensor, dim: int = -1) -> Tensor:
    """The best alternative, the first of equals; it depends on the order of utilities alone. NaN is refused."""
    return _no_nan(logits).argmax(dim)


def sample_decision(
    logits: Tensor, rationality: float | Tensor = 1.0, *, generator: torch.Generator | None = None
) -> Tensor:
    """One draw from `rational_choice` for each row of `[..., V]`."""
    chances = rational_choice(logits, rationality).exp()
    flat = chances.reshape(-1, chances.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(chances.shape[:-1])


def sample_sequences(
    step: Step,
    prefix: Tensor,
    eos: int,
    max_len: int,
    *,
    rationality: float | Tensor = 1.0,
    pad: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw sequences token by token; all rows are computed in one forward pass a step.

    Args:
        step: function from tokens `[B, T]` to logits `[B, V]` of the next.
        prefix: `[B, P]`, kept at the front; rows end alike.
        eos: token that ends a sequence.
        max_len: maximum number of tokens drawn; an unfinished row has no `eos`.
        rationality: $\\kappa$, one number or one for each row `[B]`, so that a whole grid is one batch.
            `float("inf")` takes the best token: greedy decoding.
        pad: token after the end.
        generator: source of the draws.

    Returns:
        Drawn tokens `[B, <= max_len]`, without the prefix.
    """
    whole("max_len", max_len, 1)
    _prefix(prefix, 2)
    kappa = torch.as_tensor(rationality, dtype=torch.float32, device=prefix.device).expand(len(prefix))
    if not bool((kappa > 0).all()):
        raise ValueError(f"expected rationality above 0, got {float(kappa.min())}")
    best = kappa.isinf()
    tokens, done = prefix, torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
    for _ in range(max_len):
        logits = _next(step, tokens).float()
        drawn = sample_decision(logits, kappa.masked_fill(best, 1.0)[:, None], generator=generator)
        drawn = torch.where(best, logits.argmax(-1), drawn).masked_fill(done, pad)
        tokens = torch.cat([tokens, drawn[:, None]], 1)
        done = done | (drawn == eos)
        if bool(done.all()):
            break
    return tokens[:, prefix.shape[1] :]


def mbr_decision(
    candidates: Sequence[Any], utility: Callable[[Any, Any], float], weights: Sequence[float] | Tensor | None = None
) -> int:
    """Place of the candidate of the highest expected utility, $\\arg\\max_i \\sum_j \\omega_j G(c_i, c_j)$, the first of equals.

    Args:
        candidates: S outputs, normally samples.
        utility: $G$ of a candidate if another is the truth.
        weights: $\\omega_j \\ge 0$; equal by default, as for samples drawn at the rationality that is meant. For samples
            drawn at 1 and read again at $\\kappa$: proportional to $\\exp((\\kappa - 1) U(c_j))$.

    Raises:
        ValueError: if there is no candidate, or weights are not as many, negative, not finite or all 0, or a utility is not
            finite.
    """
    if not len(candidates):
        raise ValueError("expected at least one candidate, got none")
    omega = torch.ones(len(candidates)) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    same_length(candidates=candidates, weights=omega)
    finite("weights", omega)
    if bool((omega < 0).any()) or not bool(omega.any()):
        raise ValueError("expected weights of at least 0, not all of them 0")
    # Equal candidates are scored once.
    keys = [tuple(c) if isinstance(c, list) else c for c in candidates]
    unique = list(dict.fromkeys(keys))
    index = {key: k for k, key in enumerate(unique)}
    mass = torch.zeros(len(unique), dtype=torch.float64)
    for key, weight in zip(keys, omega.tolist(), strict=True):
        mass[index[key]] += weight
    table = torch.tensor([[float(utility(a, b)) for b in unique] for a in unique], dtype=torch.float64)
    finite("utility", table)
    return keys.index(unique[int((table @ mass).argmax())])


@dataclass(frozen=True)
class Beam:
    """Outputs of a beam search, best first.

    Attributes:
        sequences: token lists without `bos`; those that ended close with `eos`.
        totals: sums of log-probabilities (over the length with `normalize`).
    """

    sequences: tuple[tuple[int, ...], ...]
    totals: tuple[float, ...]


@torch.no_grad()
def beam_search(
    step: Step, prefix: Tensor, eos: int, beam: int, max_len: int, *, rationality: float = 1.0, normalize: bool = False
) -> Beam:
    """Keep the best partial sums of log-probabilities; finished outputs compete by their totals.

    The result is unchanged by increasing linear maps of the totals, not by increasing maps of every step's scores.

    Args:
        step: function from tokens `[B, T]` to logits `[B, V]` of the next.
        prefix: one row `[P]`.
        eos: token that ends a sequence.
        beam: number of partial sequences kept.
        max_len: maximum number of tokens.
        rationality: $\\kappa$ of every step.
        normalize: whether totals are divided by the number of tokens.
    """
    whole("beam", beam, 1)
    whole("max_len", max_len, 1)
    tokens, totals = _prefix(prefix, 1)[None], torch.zeros(1, dtype=torch.float64, device=prefix.device)
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, max_len + 1):
        scores = totals[:, None] + rational_choice(_next(step, tokens).double(), rationality)
        best = scores.flatten().topk(min(2 * beam, scores.numel()))
        rows, choices = best.indices // scores.shape[1], best.indices % scores.shape[1]
        ended = choices == eos
        # An end counts only where it is among the best, so that a beam of one is greedy decoding.
        kept = ended & (torch.arange(len(ended), device=ended.device) < beam)
        for row, total in zip(rows[kept], best.values[kept], strict=True):
            value = float(total) / length if normalize else float(total)
            finished.append((value, (*tokens[row, len(prefix) :].tolist(), eos)))
        rows, choices, totals = rows[~ended][:beam], choices[~ended][:beam], best.values[~ended][:beam]
        tokens = torch.cat([tokens[rows], choices[:, None]], 1)
        finished = sorted(finished, key=lambda pair: -pair[0])[:beam]
        if not len(totals) or (not normalize and len(finished) == beam and finished[-1][0] >= float(totals[0])):
            break
    else:
        for row, total in zip(tokens, totals.tolist(), strict=True):
            finished.append((total / max_len if normalize else total, tuple(row[len(prefix) :].tolist())))
    finished = sorted(finished, key=lambda pair: -pair[0])[:beam]
    return Beam(tuple(s for _, s in finished), tuple(t for t, _ in finished))
