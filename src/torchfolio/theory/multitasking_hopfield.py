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

What theory says about it is in `hopfield_mean_field`, whose names are here too. The file is longer than others because
it holds the network, the generators of its data and the identity of energy and losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchfolio import checks
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


@dataclass(frozen=True)
class Relaxation:
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
        x = _ternary(data, "examples" if self.rule != "storing" else "patterns").double()
        if (labels is None) == (self.rule == "supervised"):
            want = "labels [E], one for each example," if labels is None else "no labels"
            raise ValueError(f"expected {want} for the {self.rule} rule")
        if self.rule == "storing" and quality is not None:
            raise ValueError("expected no quality for the storing rule, which takes patterns, not examples")
        self.N = x.shape[-1]
        present = (x != 0).double().mean((-2, -1))
        if labels is not None:
            x, counts = _means(x, labels)
            power = x.square().sum(-1) / (x != 0).double().sum(-1) if quality is None else _power(x, counts, quality)
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
            _check_quality(r2)
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
        reference = self.patterns if patterns is None else _ternary(patterns, "patterns").double()
        if reference.shape[-1] != self.N:
            raise ValueError(f"expected patterns of {self.N} spins, got shape {tuple(reference.shape)}")
        generator = _generator(seed, "dynamics", s.device)
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
                later = _prefix(x, w) if x.shape[-2] <= FEW else _gram(x.mT @ w)
            else:
                rows = self.dense[..., order[block], :]
                h, later = states @ rows[..., order].mT, _gram(rows[..., order[block]])
            after = _settled(before, h, None if threshold is None else threshold[..., block], later)
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
        generator = _generator(seed, "dynamics", s.device)
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


Effect = Callable[[Tensor], Tensor]


def _settled(before: Tensor, h: Tensor, threshold: Tensor | None, later: Effect) -> Tensor:
    """Spins of a block `[..., R, B]` after updates one by one.

    Args:
        before: spins, with fields `h` as if none of the block turned.
        h: `[..., R, B]`.
        threshold: of the heat bath; `None` without noise.
        later: from the changes of spins to what they add to the fields of the spins after them.
    """
    # Equal sums may differ by rounding; a tie must keep the spin.
    tie = 1e-12 * h.abs().amax() if threshold is None else 0.0
    after, field = before, h
    while True:
        if threshold is None:
            decided = torch.where(field.abs() <= tie, before, field.sign())
        else:
            decided = torch.where(field > threshold, 1.0, -1.0).to(field)
        if torch.equal(decided, after):
            return after
        after = decided
        field = h + later(after - before)


def _gram(couplings: Tensor) -> Effect:
    upper = couplings.triu(1)
    return lambda change: change @ upper


def _prefix(x: Tensor, w: Tensor) -> Effect:
    """As `_gram(x.mT @ w)`, by running sums of the few overlaps."""
    x, w = x[..., None, :, :], w[..., None, :, :]

    def effect(change: Tensor) -> Tensor:
        moved = change[..., None, :] * x
        return ((moved.cumsum(-1) - moved) * w).sum(-2)

    return effect


# Patterns, examples and states


def sparse_patterns(N: int, K: int, d: float, samples: int | None = None, seed: int = 0) -> Tensor:
    """Random patterns with blanks: 0 with probability d, -1 and 1 with equal ones.

    Args:
        N: number of spins.
        K: number of patterns.
        d: dilution, in [0, 1).
        samples: sets of patterns; `None` for one without a leading dimension.
        seed: seed of the patterns.

    Returns:
        `[K, N]` or `[samples, K, N]` in float64.
    """
    for value, name in ((N, "N"), (K, "K"), (1 if samples is None else samples, "samples")):
        checks.whole(name, value, low=1)
    checks.between("dilution d", d, 0, 1, inclusive=(True, False))
    shape = (K, N) if samples is None else (samples, K, N)
    u = torch.rand(shape, generator=_generator(seed, "patterns", torch.device("cpu")), dtype=torch.float64)
    return torch.where(u < d, 0.0, torch.where(u < (1 + d) / 2, 1.0, -1.0)).double()


def example_set(
    patterns: Tensor, r: float | Sequence[float], M: int | Sequence[int], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noisy examples of patterns, $\\eta_i^{\\mu a} = \\xi_i^\\mu \\chi_i^{\\mu a}$ with $\\chi = 1$ with probability (1+r)/2 and -1
    otherwise; blanks stay blank.

    Args:
        patterns: `[..., K, N]`.
        r: quality in (0, 1], one for all patterns or one for each.
        M: number of examples, one for all or one for each.
        seed: seed of the noise.

    Returns:
        Examples `[..., E, N]` and the pattern of each, `[E]`.
    """
    x = _ternary(patterns, "patterns")
    K = x.shape[-2]
    sizes = torch.as_tensor(M, device=x.device).expand(K)
    quality = torch.as_tensor(r, dtype=torch.float64, device=x.device).expand(K)
    _check_quality(quality)
    if sizes.is_floating_point() or not bool((sizes >= 1).all()):
        raise ValueError(f"expected M to be at least 1 example, in whole numbers, got {M!r}")
    labels = torch.arange(K, device=x.device).repeat_interleave(sizes)
    shown = x[..., labels, :]
    generator = _generator(seed, "examples", x.device)
    u = torch.rand(shown.shape, generator=generator, device=x.device, dtype=torch.float64)
    return torch.where(u < (1 + quality[labels, None]) / 2, shown, -shown), labels


def fill_blanks(cue: Tensor, replicas: int | None = None, seed: int = 0) -> Tensor:
    """States that agree with a cue and are random where it is blank.

    Args:
        cue: `[..., N]`, entries -1, 0 and 1; all zeros give random states.
        replicas: states for each cue; `None` for one without a dimension of its own.
        seed: seed of the signs.

    Returns:
        `[..., N]`, or `[..., replicas, N]`.
    """
    x = _ternary(cue, "cue", blank=True)
    if replicas is not None:
        checks.whole("replicas", replicas, low=1)
        x = x[..., None, :].expand(*x.shape[:-1], replicas, x.shape[-1])
    generator = _generator(seed, "blanks", x.device)
    signs = torch.randint(2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1
    return torch.where(x == 0, signs, x)


def hierarchical_state(patterns: Tensor, seed: int = 0) -> Tensor:
    """The state `[..., N]` in which each spin serves the first pattern that is not blank there, at random if none."""
    x = _ternary(patterns, "patterns")
    first = (x != 0).long().argmax(-2, keepdim=True)
    return fill_blanks(x.gather(-2, first)[..., 0, :], seed=seed)


def parallel_state(patterns: Tensor, seed: int = 0) -> Tensor:
    """The state `[..., N]` of the patterns' majority, $\\sigma_i = \\operatorname{sign} \\sum_\\mu \\xi_i^\\mu$, at random on ties."""
    return fill_blanks(_ternary(patterns, "patterns").sum(-2).sign(), seed=seed)


def sse_losses(states: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of states as reconstructions of patterns and of their negatives:
    $L_\\mu^\\pm = \\frac1{2N} \\lVert \\xi^\\mu \\mp \\sigma \\rVert^2$.

    Args:
        states: `[..., R, N]`.
        patterns: `[..., K, N]`.

    Returns:
        $L^+$ and $L^-$, `[..., R, K]`.
    """
    x = _ternary(patterns, "patterns").double()
    s = states.double()[..., :, None, :]
    x = x[..., None, :, :]
    return (x - s).square().mean(-1) / 2, (x + s).square().mean(-1) / 2


def energy_from_losses(plus: Tensor, minus: Tensor, blanks: Tensor) -> Tensor:
    """Energy per spin of the storing rule by the squared errors, exactly:
    $\\frac HN = -\\frac12 \\sum_\\mu [(1 - \\hat d_\\mu/2)^2 - L_\\mu^+ L_\\mu^-]$, so that minima of one are minima of the other.

    In the raw unit (`normalize=False`), with $J_{ii}$ included.

    Args:
        plus: $L^+$, `[..., K]`.
        minus: $L^-$, `[..., K]`.
        blanks: share of blanks in each pattern, `[..., K]`.
    """
    return -((1 - blanks / 2).square() - plus * minus).sum(-1) / 2


def to_ternary(x: Tensor, d: float) -> Tensor:
    """Real data as patterns with blanks: the share d of entries nearest to their row's median becomes blank, the others
    the sign of their difference from it.

    Args:
        x: rows `[..., N]`; images are flattened first.
        d: share of blanks, in [0, 1); more where entries are equal to the median.
    """
    checks.finite("x", x)
    checks.between("the share of blanks d", d, 0, 1, inclusive=(True, False))
    centred = x.double() - x.double().median(-1, keepdim=True).values
    rank = centred.abs().argsort(-1).argsort(-1)
    return torch.where(rank < round(d * x.shape[-1]), 0.0, centred.sign()).double()


def _means(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean example of each label, `[..., K, N]`, and the number of its examples."""
    if labels.shape != x.shape[-2:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"expected integer labels [{x.shape[-2]}], got {labels.dtype} of shape {tuple(labels.shape)}")
    labels = labels.to(x.device).long()
    counts = labels.clamp_min(0).bincount()
    if int(labels.min()) < 0 or not bool(counts.all()):
        raise ValueError(f"expected labels 0..K-1, each with an example, got {labels.unique().tolist()}")
    total = x.new_zeros(*x.shape[:-2], len(counts), x.shape[-1]).index_add_(-2, labels, x)
    return total / counts[:, None], counts


def _power(x: Tensor, counts: Tensor, quality: float | Sequence[float]) -> Tensor:
    r2 = torch.as_tensor(quality, dtype=torch.float64, device=x.device).square()
    _check_quality(r2)
    return (r2 + (1 - r2) / counts).expand(x.shape[:-1])


def _ternary(x: Tensor, name: str, blank: bool = False) -> Tensor:
    """`x` if its entries are -1, 0 and 1 and no row is all blank (unless it may be)."""
    if not isinstance(x, Tensor) or x.dim() < (1 if blank else 2) or not x.numel():
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected {name} as a tensor [{'...' if blank else '..., K'}, N], got {got}")
    if not bool(((x == 0) | (x.abs() == 1)).all()):
        raise ValueError(f"expected {name} with entries -1, 0 and 1; to_ternary makes them from real data")
    if not blank and not bool((x != 0).any(-1).all()):
        raise ValueError(f"expected {name} that are not all blank, got a row of zeros")
    return x


def _check_quality(r: Tensor) -> None:
    if not bool(((r > 0) & (r <= 1)).all()):
        raise ValueError(f"expected quality r in (0, 1], got {r.tolist()}")


def _generator(seed: int, purpose: str, device: torch.device) -> torch.Generator:
    """A generator for each purpose, so that one seed given to several functions does not tie their draws together."""
    state = np.random.SeedSequence([checks.whole("seed", seed, low=0), *purpose.encode()]).generate_state(1)
    return torch.Generator(device=device).manual_seed(int(state[0]))


def _noise(temperature: float) -> float:
    return float(checks.between("temperature", temperature, 0, float("inf"), inclusive=(True, False)))
