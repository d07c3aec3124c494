"""Recall in Hopfield networks of diluted patterns, which are stored as they are or learned from noisy examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.runs import Run
from torchfolio.theory.multitasking_hopfield import (
    MultitaskingHopfield,
    example_set,
    fill_blanks,
    learning_curve,
    mean_field,
    sparse_patterns,
)


def drawn_patterns(run: Run[Any], N: int, K: int, d: float, samples: int) -> Tensor:
    """Sets of patterns `[samples, K, N]` of a dilution, of the run's seed."""
    return sparse_patterns(N, K, d, samples, seed=run.seed).to(run.device)


def relaxed(
    network: MultitaskingHopfield, patterns: Tensor, settings: Any, seed: int, T: float = 0.0
) -> dict[str, Tensor]:
    """Overlaps with all patterns in recall from the first one: as they are, and in descending order in each replica."""
    sweeps = settings.noisy_sweeps if T else settings.sweeps
    starts = fill_blanks(patterns[:, 0], settings.replicas, seed=seed)
    relaxation = network.relax(starts, sweeps, temperature=T, seed=seed, patterns=patterns)
    last = sweeps // 2 if T else 1
    thermal = relaxation.magnetisations[-last:].abs().mean((0, -2))
    return {"thermal": thermal, "ordered": relaxation.amplitudes(last).mean(0)}


def by_patterns(run: Run[Any], N: int, K: int, d: float, samples: int, T: float = 0.0) -> dict[str, Any]:
    """Overlaps of recall from patterns stored as they are, next to theory."""
    patterns, theory = drawn_patterns(run, N, K, d, samples), mean_field(K, d, T).best
    recalled = relaxed(MultitaskingHopfield().fit(patterns), patterns, run.settings, run.seed, T)
    return {**recalled, "theory": theory.amplitudes, "regime": theory.regime}


def dense(run: Run[Any]) -> dict[str, float]:
    """Overlaps in an ordinary Hopfield network, from one pattern and from an equal mixture of two."""
    settings = run.settings
    patterns = drawn_patterns(run, settings.N, 3, 0.0, settings.samples)
    network = MultitaskingHopfield().fit(patterns)
    m = relaxed(network, patterns, settings, run.seed)["thermal"].mean(0)
    mixture = fill_blanks((patterns[:, 0] + patterns[:, 1]).sign(), settings.replicas, seed=run.seed)
    mixed = network.relax(mixture, settings.sweeps, seed=run.seed).magnetisations[-1].abs()[..., :2]
    return {"first": float(m[0]), "others": float(m[1:].max()), "both": float(mixed.min(-1).values.max())}


def by_examples(run: Run[Any], rule: Any) -> dict[str, Any]:
    """Overlaps of recall from patterns learned from more and more examples, with a teacher or without."""
    settings = run.settings
    patterns = drawn_patterns(run, settings.learning_N, 3, settings.learning_d, settings.samples)
    rows = []
    for M in settings.M:
        examples, labels = example_set(patterns, settings.r, M, seed=run.seed)
        data = (examples, labels) if rule == "supervised" else (examples,)
        network = MultitaskingHopfield(rule).fit(*data, quality=settings.r, n_patterns=3)
        rows.append(relaxed(network, patterns, settings, run.seed)["ordered"])
    m = torch.stack(rows)
    return {"m": m, "m1": m[:, 0]}


def in_theory(settings: Any) -> dict[str, Any]:
    """Those overlaps in the limit of many spins."""
    m = learning_curve(3, settings.learning_d, settings.r, settings.M)
    return {"m": m, "m1": m[:, 0]}


def unbalanced(run: Run[Any]) -> dict[str, Any]:
    """Patterns of different quality and number of examples, with a teacher, next to theory."""
    settings, r, M = run.settings, (0.3, 0.5, 0.4), (81, 11, 11)
    patterns = drawn_patterns(run, settings.learning_N, 3, settings.learning_d, settings.samples)
    network = MultitaskingHopfield("supervised").fit(*example_set(patterns, r, M, seed=run.seed), quality=r)
    recalled = relaxed(network, patterns, settings, run.seed)
    return {**recalled, "theory": learning_curve(3, settings.learning_d, r, [M])[0]}
