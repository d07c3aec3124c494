"""Multitasking Hopfield networks: associative memories of sparse patterns that recall several of them at once.

Elena Agliari, Andrea Alessandrelli, Adriano Barra, Federico Ricci-Tersenghi, "Parallel Learning by Multitasking Neural
Networks", J. Stat. Mech. 2023, https://arxiv.org/abs/2308.04106.

Patterns have entries -1, 0 and 1. Spins that are blank in one pattern are free to serve another, so that a single
relaxation recalls all patterns: with strengths that fall hierarchically at mild dilution, with equal ones at strong
dilution. The couplings store the patterns themselves, or are learned from noisy examples with a teacher or without:

    patterns = sparse_patterns(2000, K=3, d=0.25)
    network = MultitaskingHopfield().fit(patterns)
    relaxation = network.relax(fill_blanks(patterns[0], replicas=20))
    relaxation.amplitudes()                               # about 0.75, 0.19, 0.05
    examples, labels = example_set(patterns, r=0.3, M=41)
    MultitaskingHopfield("supervised").fit(examples, labels)

What theory says about it is in `hopfield_mean_field`, its data in `ternary_patterns`; their names are here too.

Longer than most because the couplings stay factors, of patterns and of examples with and without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.shown import Shown
from torchfolio.theory.heat_bath import by_gram, by_prefix, settled
from torchfolio.theory.hopfield_mean_field import (
    FixedPoint,
    MeanField,
    PhaseDiagram,
    critical_dilution,
    dataset_entropy,
    examples_needed,
    hierarchical_amplitudes,
    learning_curve,
    mean_field,
    parallel_amplitude,
    phase_diagram,
    regime,
    self_consistency,
    single_pattern_learning,
)
from torchfolio.theory.ternary_patterns import (
    check_quality,
    check_ternary,
    energy_from_losses,
    example_set,
    fill_blanks,
    generator_for,
    hierarchical_state,
    parallel_state,
    sparse_patterns,
    sse_losses,
    to_ternary,
)

__all__ = [
    "FixedPoint",
    "MeanField",
    "MultitaskingHopfield",
    "PhaseDiagram",
    "Relaxation",
    "critical_dilution",
    "dataset_entropy",
    "energy_from_losses",
    "example_set",
    "examples_needed",
    "fill_blanks",
    "hierarchical_amplitudes",
    "hierarchical_state",
    "learning_curve",
    "mean_field",
    "parallel_amplitude",
    "parallel_state",
    "phase_diagram",
    "regime",
    "self_consistency",
    "single_pattern_learning",
    "sparse_patterns",
    "sse_losses",
    "to_ternary",
]

BLOCK = 512  # spins that are updated together, in the order and with the result of one by one
FEW = 16  # factors up to which running sums are faster than a matrix for each block


@dataclass(frozen=True, repr=False)
class Relaxation(Shown):
    """What a relaxation went through.

    Attributes:
        states: final states `[..., R, N]`.
        magnetisations: overlaps $m_\\mu = \\frac1N \\sum_i \\xi_i^\\mu \\sigma_i$ at each record, `[T, ..., R, K]`.
        energies: energies at each record, `[T, ..., R]`.
        sweeps: sweeps done at each record; 0 is the start.
    """

    states: Tensor
    magnetisations: Tensor
    energies: Tensor
    sweeps: tuple[int, ...]

    def amplitudes(self, last: int = 1) -> Tensor:
        """Strengths of recall in descending order, $|m_\\mu|$ averaged over the last records and the replicas, `[..., K]`.

        Args:
            last: number of records.
        """
        checks.whole("last", last, 1, len(self.sweeps))
        mean = self.magnetisations[-last:].abs().mean(0)
        return mean.sort(-1, descending=True).values.mean(-2)


class MultitaskingHopfield:
    """A Hopfield network of $\\pm 1$ spins for patterns with blanks.

    $$H(\\sigma) = -\\frac12 \\sum_{i \\ne j} J_{ij} \\sigma_i \\sigma_j, \\qquad
    J_{ij} = \\frac{1}{N(1-d)} \\sum_\\mu \\xi_i^\\mu \\xi_j^\\mu \\;(\\text{storing}), \\quad
    \\sum_\\mu \\frac{\\bar\\eta_i^\\mu \\bar\\eta_j^\\mu}{N(1-d)R_\\mu} \\;(\\text{supervised}), \\quad
    \\sum_{\\mu, a} \\frac{\\eta_i^{\\mu a} \\eta_j^{\\mu a}}{N(1-d)RM} \\;(\\text{unsupervised}),$$

    where $\\bar\\eta^\\mu$ is the mean of the M examples of a pattern and $R = r^2 + (1-r^2)/M$. The couplings are kept as
    their factors; a matrix of N x N is formed only if there are more examples than spins.

    Args:
        rule: `"storing"` (of patterns), `"supervised"` (examples with labels) or `"unsupervised"` (examples alone).
        normalize: whether couplings are divided by $(1-d)R$, which makes the critical noise 1; otherwise it is $(1-d)R$.
        temperature: noise of the dynamics, at least 0.

    Shapes:
        patterns `[..., K, N]`, examples `[..., E, N]`, states `[..., R, N]`: leading dimensions are samples of the disorder
        that are simulated side by side, R replicas in each.

    Reference:
        Sections 2 (storing) and 3 (learning).
    """

    def __init__(
        self,
        rule: Literal["storing", "supervised", "unsupervised"] = "storing",
        normalize: bool = True,
        temperature: float = 0.0,
    ) -> None:
        checks.one_of("rule", rule, ("storing", "supervised", "unsupervised"))
        self.rule, self.normalize, self.temperature = rule, normalize, _noise(temperature)

    def __repr__(self) -> str:
        return f"MultitaskingHopfield({self.rule!r}, normalize={self.normalize}, temperature={self.temperature:g})"

    def fit(
        self,
        data: Tensor,
        labels: Tensor | None = None,
        *,
        quality: float | Sequence[float] | None = None,
        n_patterns: int = 1,
    ) -> MultitaskingHopfield:
        """Set the couplings.

        Args:
            data: patterns, or examples for the rules that learn; entries -1, 0 and 1.
            labels: pattern of each example, `[E]`, from 0; for the supervised rule alone. Patterns may have different
                numbers of examples.
            quality: r, one for all patterns or (supervised) one for each. By default it is measured: $R_\\mu$ is the mean
                square of $\\bar\\eta^\\mu$ where it is not blank, and without labels RM is the mean of the largest
                `n_patterns` eigenvalues of the couplings.
            n_patterns: number of patterns behind unlabelled examples, which sets nothing but the unit of noise.

        Returns:
            This network.

        Raises:
            ValueError: if an entry is not -1, 0 or 1, a pattern is all blank, or labels are missing or not wanted.
        """
        x = check_ternary(data, "examples" if self.rule != "storing" else "patterns").double()
        if (labels is None) == (self.rule == "supervised"):
            want = "labels [E], one for each example," if labels is None else "no labels"
            raise ValueError(f"expected {want} for the {self.rule} rule")
        if self.rule == "storing" and quality is not None:
            raise ValueError("expected no quality for the storing rule, which takes patterns, not examples")
        self.N = x.shape[-1]
        present = (x != 0).double().mean((-2, -1))
        if labels is not None:
            x, counts, spins = _means(x, labels)
            power = x.square().sum(-1) / spins if quality is None else _power(x, counts, quality)
            self.patterns = x.sign()
        elif self.rule == "unsupervised":
            checks.whole("n_patterns", n_patterns, low=1)
            power = self._unlabelled_power(x, present, quality, n_patterns)[..., None]
            self.patterns = x
        else:
            power, self.patterns = torch.ones_like(present)[..., None], x
        examples = x.shape[-2] / n_patterns if self.rule == "unsupervised" else 1.0
        scale = present[..., None] * power if self.normalize else torch.full_like(power, examples)
        self.factors, self.weights = x, (1 / (self.N * scale)).expand(x.shape[:-1])
        self.dense = self.couplings() if x.shape[-2] > self.N else None
        return self

    def _unlabelled_power(
        self, x: Tensor, present: Tensor, quality: float | Sequence[float] | None, n_patterns: int
    ) -> Tensor:
        """$RM = r^2 M + 1 - r^2$, averaged over patterns."""
        if quality is not None:
            r2 = torch.as_tensor(quality, dtype=torch.float64, device=x.device).square()
            check_quality(r2)
            return ((r2 * x.shape[-2] / n_patterns) + 1 - r2).mean().expand(present.shape)
        gram = x @ x.mT if x.shape[-2] <= self.N else x.mT @ x
        top = torch.linalg.eigvalsh(gram)[..., -n_patterns:].mean(-1)
        return top / (self.N * present)

    def couplings(self) -> Tensor:
        """The matrix J, `[..., N, N]`, with zeros on its diagonal; for small networks."""
        J = self.factors.mT @ (self.weights[..., None] * self.factors)
        return J - torch.diag_embed(J.diagonal(dim1=-2, dim2=-1))

    def field(self, states: Tensor) -> Tensor:
        """Local fields $h_i = \\sum_{j \\ne i} J_{ij} \\sigma_j$, `[..., R, N]`."""
        s = self._states(states)
        scaled = self.weights[..., None] * self.factors
        return (s @ self.factors.mT) @ scaled - s * (self.factors * scaled).sum(-2, keepdim=True)

    def energy(self, states: Tensor, diagonal: bool = False) -> Tensor:
        """Energies $-\\frac12 \\sigma^\\top J \\sigma$, `[..., R]`.

        Args:
            states: `[..., R, N]`.
            diagonal: whether the constant of a nonzero $J_{ii}$ is added, as in the identity with losses.
        """
        overlaps = self._states(states) @ self.factors.mT
        energy = -(overlaps.square() @ self.weights[..., None])[..., 0] / 2
        if diagonal:
            return energy
        return energy + (self.weights[..., None] * self.factors.square()).sum((-2, -1))[..., None] / 2

    def relax(
        self,
        states: Tensor,
        sweeps: int = 20,
        *,
        temperature: float | None = None,
        seed: int = 0,
        record_every: int = 1,
        patterns: Tensor | None = None,
    ) -> Relaxation:
        """Heat-bath dynamics, spin by spin in a fresh random order in every sweep:
        $\\sigma_i \\leftarrow +1$ with probability $1/(1+e^{-2h_i/T})$; at T = 0 the sign of $h_i$, a tie keeps $\\sigma_i$.

        Replicas and samples share the order; blocks of spins are updated together, with exactly the result of one by one.

        Args:
            states: starts `[..., R, N]` or `[N]`, entries -1 and 1.
            sweeps: updates of every spin, at least 0.
            temperature: noise; that of the network by default.
            seed: seed of order and noise.
            record_every: sweeps from one record to the next.
            patterns: `[..., K, N]` to measure overlaps with; by default the stored ones, or the majority of the examples
                of each label, or the unlabelled examples themselves.

        Returns:
            Final states in the type of the starts, and the trace.
        """
        checks.whole("record_every", record_every, low=1)
        checks.whole("sweeps", sweeps, low=0)
        T = self.temperature if temperature is None else _noise(temperature)
        s = self._states(states).expand(*self.factors.shape[:-2], -1, -1).clone()
        reference = self.patterns if patterns is None else check_ternary(patterns, "patterns").double()
        if reference.shape[-1] != self.N:
            raise ValueError(f"expected patterns of {self.N} spins, got shape {tuple(reference.shape)}")
        generator = generator_for(seed, "dynamics", s.device)
        records, moments = [], []
        for sweep in range(sweeps + 1):
            if sweep:
                self._sweep(s, T, generator)
            if sweep % record_every == 0 or sweep == sweeps:
                moments.append(sweep)
                records.append((s @ reference.mT / self.N, self.energy(s)))
        magnetisations, energies = (torch.stack(parts) for parts in zip(*records, strict=True))
        return Relaxation(s.to(states.dtype), magnetisations, energies, tuple(moments))

    def _sweep(self, s: Tensor, T: float, generator: torch.Generator) -> None:
        """One update of every spin, in place.

        The heat bath is a threshold: the spin is +1 if $h > \\theta$ for a random $\\theta$. Within a block only the spins
        before i change its field. Iterated to a fixed point of this triangular system, which is unique, the thresholds
        give the spins that one update after another would give; a few iterations do.
        """
        order = torch.randperm(self.N, generator=generator, device=s.device)
        states, factors = s[..., order], self.factors[..., order]
        scaled = self.weights[..., None] * factors
        own = (factors * scaled).sum(-2, keepdim=True)
        threshold = None
        if T > 0:
            u = torch.rand(s.shape, generator=generator, device=s.device, dtype=s.dtype)
            threshold = torch.logit(u.clamp_min_(1e-300)).mul_(T / 2)
        overlaps = states @ factors.mT
        for block in (slice(start, start + BLOCK) for start in range(0, self.N, BLOCK)):
            before, x, w = states[..., block], factors[..., block], scaled[..., block]
            if self.dense is None:
                h = torch.addcmul(overlaps @ w, before, own[..., block], value=-1)
                later = by_prefix(x, w) if x.shape[-2] <= FEW else by_gram(x.mT @ w)
            else:
                rows = self.dense[..., order[block], :]
                h, later = states @ rows[..., order].mT, by_gram(rows[..., order[block]])
            after = settled(before, h, None if threshold is None else threshold[..., block], later)
            if after is not before:
                if self.dense is None:
                    overlaps = overlaps + (after - before) @ x.mT
                states[..., block] = after
        s[..., order] = states

    def recall(self, cue: Tensor, seed: int = 0, max_sweeps: int = 100) -> Tensor:
        """The state that a cue relaxes to without noise.

        Args:
            cue: `[..., R, N]` or `[N]`, entries -1, 0 and 1; blanks start at random.
            seed: seed of blanks and order.
            max_sweeps: maximum number of sweeps.

        Returns:
            States of the cue's shape (with the leading dimensions of the patterns), at which no spin wants to turn.

        Raises:
            RuntimeError: if the states have not settled after `max_sweeps`.
        """
        checks.whole("max_sweeps", max_sweeps, low=1)
        s = fill_blanks(cue, seed=seed)
        s = self._states(s).expand(*self.factors.shape[:-2], -1, -1).clone()
        generator = generator_for(seed, "dynamics", s.device)
        for _ in range(max_sweeps):
            before = s.clone()
            self._sweep(s, 0.0, generator)
            if torch.equal(s, before):
                return (s[0] if cue.dim() == 1 and s.dim() == 2 else s).to(cue.dtype)
        raise RuntimeError(f"the states have not settled after {max_sweeps} sweeps")

    def _states(self, states: Tensor) -> Tensor:
        if not hasattr(self, "factors"):
            raise ValueError("expected a network with couplings; call fit first")
        if states.shape[-1:] != (self.N,) or not bool((states.abs() == 1).all()):
            raise ValueError(f"expected states [..., {self.N}] of -1 and 1, got shape {tuple(states.shape)}")
        s = states.to(torch.float64)
        return s[None] if s.dim() == 1 else s


def _means(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean example of each label, `[..., K, N]`, the number of its examples, and of its spins that are not blank."""
    if labels.shape != x.shape[-2:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"expected integer labels [{x.shape[-2]}], got {labels.dtype} of shape {tuple(labels.shape)}")
    labels = labels.to(x.device).long()
    counts = labels.clamp_min(0).bincount()
    if int(labels.min()) < 0 or not bool(counts.all()):
        raise ValueError(f"expected labels 0..K-1, each with an example, got {labels.unique().tolist()}")
    zeros = x.new_zeros(*x.shape[:-2], len(counts), x.shape[-1])
    total, shown = zeros.index_add(-2, labels, x), zeros.index_add(-2, labels, x.abs())
    # Where examples cancel, the mean is 0 though the pattern is not blank.
    return total / counts[:, None], counts, (shown > 0).double().sum(-1)


def _power(x: Tensor, counts: Tensor, quality: float | Sequence[float]) -> Tensor:
    r2 = torch.as_tensor(quality, dtype=torch.float64, device=x.device).square()
    check_quality(r2)
    return (r2 + (1 - r2) / counts).expand(x.shape[:-1])


def _noise(temperature: float) -> float:
    return float(checks.between("temperature", temperature, 0, float("inf"), inclusive=(True, False)))
