"""Multitasking Hopfield networks: identities, the sampler against one spin at a time, theory against closed forms."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from torchfolio.theory import multitasking_hopfield
from torchfolio.theory.multitasking_hopfield import (
    MultitaskingHopfield,
    critical_dilution,
    dataset_entropy,
    energy_from_losses,
    example_set,
    examples_needed,
    fill_blanks,
    hierarchical_amplitudes,
    hierarchical_state,
    learning_curve,
    mean_field,
    parallel_amplitude,
    parallel_state,
    phase_diagram,
    regime,
    self_consistency,
    single_pattern_learning,
    sparse_patterns,
    sse_losses,
    to_ternary,
)

RULES = ("storing", "supervised", "unsupervised")


def fitted(rule: str, patterns: Tensor, r: float = 0.5, M: int = 7, **options) -> MultitaskingHopfield:
    examples, labels = example_set(patterns, r, M)
    network = MultitaskingHopfield(rule, **options)  # pyright: ignore[reportArgumentType]
    if rule == "storing":
        return network.fit(patterns)
    if rule == "supervised":
        return network.fit(examples, labels, quality=r)
    return network.fit(examples, quality=r, n_patterns=patterns.shape[-2])


def start(shape: tuple[int, ...], replicas: int) -> Tensor:
    return fill_blanks(torch.zeros(shape).double(), replicas)


def one_by_one(network: MultitaskingHopfield, states: Tensor, sweeps: int, T: float) -> Tensor:
    """The sampler of the definition, with the dense matrix, on the same draws."""
    J, s = network.couplings(), states.clone()
    generator = multitasking_hopfield.generator_for(0, "dynamics", s.device)
    for _ in range(sweeps):
        order = torch.randperm(s.shape[-1], generator=generator)
        u = torch.rand(s.shape, generator=generator, dtype=s.dtype) if T else s
        for k, i in enumerate(order.tolist()):
            h = s @ J[i]
            if T:
                s[:, i] = torch.where(u[:, k] < 1 / (1 + torch.exp(-2 * h / T)), 1.0, -1.0).double()
            else:
                s[:, i] = torch.where(h.abs() < 1e-12, s[:, i], h.sign())
    return s


# Energy, couplings, losses


@pytest.mark.parametrize("rule", RULES)
def test_energy_and_field_are_those_of_the_couplings(rule):
    network = fitted(rule, sparse_patterns(60, 3, 0.3))
    s = start((60,), 5)
    J = network.couplings()
    assert torch.equal(J.diagonal(), torch.zeros(60).double())
    torch.testing.assert_close(network.energy(s), -0.5 * torch.einsum("ri,ij,rj->r", s, J, s))
    torch.testing.assert_close(network.field(s), s @ J)


@pytest.mark.parametrize("seed", range(5))
def test_energy_is_the_sum_of_losses(seed):
    patterns = sparse_patterns(100, 4, 0.3, seed=seed)
    s = fill_blanks(torch.zeros(100).double(), 6, seed=seed)
    energy = MultitaskingHopfield(normalize=False).fit(patterns).energy(s, diagonal=True) / 100
    blanks = (patterns == 0).double().mean(-1)
    assert float((energy - energy_from_losses(*sse_losses(s, patterns), blanks)).abs().max()) < 1e-10


@pytest.mark.parametrize("M", [1, 4, 9])
@pytest.mark.parametrize("normalize", [True, False])
def test_perfect_examples_are_stored_patterns(M, normalize):
    patterns = sparse_patterns(80, 3, 0.4, samples=2)
    stored = fitted("storing", patterns, normalize=normalize).couplings()
    for rule in RULES[1:]:
        torch.testing.assert_close(fitted(rule, patterns, 1.0, M, normalize=normalize).couplings(), stored)


def test_measured_quality_is_the_given_one_in_a_large_network():
    patterns = sparse_patterns(20_000, 3, 0.3)
    examples, labels = example_set(patterns, (0.4, 0.6, 0.8), (5, 9, 7))
    given = MultitaskingHopfield("supervised").fit(examples, labels, quality=(0.4, 0.6, 0.8))
    torch.testing.assert_close(
        MultitaskingHopfield("supervised").fit(examples, labels).weights, given.weights, rtol=0.03, atol=0
    )
    examples, _ = example_set(patterns, 0.5, 7)
    given = MultitaskingHopfield("unsupervised").fit(examples, quality=0.5, n_patterns=3)
    measured = MultitaskingHopfield("unsupervised").fit(examples, n_patterns=3)
    torch.testing.assert_close(measured.weights, given.weights, rtol=0.03, atol=0)


# The sampler


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [0.0, 0.4, 1.0])
def test_blocks_give_what_one_spin_at_a_time_gives(rule, T, monkeypatch):
    monkeypatch.setattr("torchfolio.theory.multitasking_hopfield.BLOCK", 16)
    patterns = sparse_patterns(70, 3, 0.4)
    for M in (3, 31):  # running sums or a matrix in each block, and the dense one for more examples than spins
        network = fitted(rule, patterns, 0.5, M)
        s = start((70,), 6)
        assert torch.equal(network.relax(s, 3, temperature=T).states, one_by_one(network, s, 3, T))


def test_samples_side_by_side_are_the_samples_alone():
    patterns = sparse_patterns(200, 3, 0.3, samples=3)
    s = start((3, 200), 4)
    together = MultitaskingHopfield().fit(patterns).relax(s, 4)
    for k in range(3):
        alone = MultitaskingHopfield().fit(patterns[k]).relax(s[k], 4)
        assert torch.equal(together.states[k], alone.states)
        torch.testing.assert_close(together.magnetisations[:, k], alone.magnetisations)


def test_energy_falls_without_noise_and_detailed_balance_holds_with_it():
    network = MultitaskingHopfield().fit(sparse_patterns(400, 3, 0.4))
    assert float(network.relax(start((400,), 10), 8).energies.diff(dim=0).max()) <= 1e-9
    # Four spins: frequencies of all states against Boltzmann's.
    small = MultitaskingHopfield().fit(torch.tensor([[1.0, -1, 1, 0], [0, 1, 1, -1]]))
    s = small.relax(start((4,), 20_000), 12, temperature=0.8).states
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    expected = torch.softmax(-small.energy(every) / 0.8, 0)
    counted = (s[:, None] == every).all(-1).double().mean(0)
    assert float((counted - expected).abs().max()) < 0.012


def test_recall_records_types_and_seeds():
    patterns = sparse_patterns(600, 3, 0.25)
    network = MultitaskingHopfield().fit(patterns)
    s = fill_blanks(patterns[0], 10).to(torch.bfloat16)
    before, state = s.clone(), torch.get_rng_state()
    relaxation = network.relax(s, 7, record_every=3)
    assert torch.equal(s, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert relaxation.sweeps == (0, 3, 6, 7)
    assert relaxation.states.dtype == torch.bfloat16
    assert relaxation.magnetisations.shape == (4, 10, 3)
    assert relaxation.energies.shape == (4, 10)
    assert torch.equal(relaxation.states, network.relax(s, 7).states)
    noisy = [network.relax(s, 5, temperature=0.9, seed=seed).states for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert float((relaxation.amplitudes() - hierarchical_amplitudes(3, 0.25)).abs().max()) < 0.06
    settled = network.recall(patterns[0])
    assert settled.shape == (600,)
    assert bool((settled * network.field(settled)[0] >= -1e-12).all())
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin.relax(s, 3).states, network.relax(s, 3).states)
    assert repr(network) == "MultitaskingHopfield('storing', normalize=True, temperature=0)"


def test_reference_states_have_the_closed_magnetisations():
    patterns = sparse_patterns(100_000, 4, 0.4)
    for state, amplitudes in (
        (hierarchical_state(patterns), hierarchical_amplitudes(4, 0.4)),
        (parallel_state(patterns), torch.full((4,), parallel_amplitude(4, 0.4)).double()),
    ):
        assert bool((state.abs() == 1).all())
        assert float((patterns @ state / 100_000 - amplitudes).abs().max()) < 0.012


def test_one_seed_draws_independent_noise():
    patterns = sparse_patterns(100_000, 1, 0.5, seed=3)
    examples, _ = example_set(patterns, 0.3, 1, seed=3)
    right = (examples * patterns)[patterns != 0]
    assert abs(float(right.mean()) - 0.3) < 0.02
    # Noise does not know the sign of what it turns.
    assert abs(float(((right > 0).double() * patterns[patterns != 0]).mean())) < 0.01


# Theory


def test_critical_dilution():
    assert critical_dilution(1) == critical_dilution(2) == 1
    for K, d in ((3, (math.sqrt(5) - 1) / 2), (4, 0.5437), (5, 0.5188), (math.inf, 0.5)):
        assert abs(critical_dilution(K) - d) < 1e-4


@pytest.mark.parametrize("K", [3, 4, 5])
def test_hierarchy_is_a_fixed_point_up_to_the_critical_dilution(K):
    for step in (-0.01, 0.01):
        d = critical_dilution(K) + step
        m = hierarchical_amplitudes(K, d)
        moved = float((self_consistency(m, d)[0] - m).abs().max())
        assert moved < 1e-12 if step < 0 else moved > 1e-3


@pytest.mark.parametrize(
    ("d", "T", "ratio", "name"),
    [
        (0.5, 0.1, 0.249, "hierarchical"),
        (0.6, 0.1, 0.479, "bunched"),
        (0.8, 0.1, 0.687, "bunched"),
        (0.9, 0.1, 0.868, "parallel"),
        (0.95, 0.1, 1.0, "parallel"),
        (0.9, 0.2, 1.0, "parallel"),
        (0.7, 0.4, 1.0, "parallel"),
        (0.2, 0.4, 0.0, "pure"),
    ],
)
def test_mean_field_ratios(d, T, ratio, name):
    best = mean_field(3, d, T).best
    assert best.regime == name
    assert abs(best.amplitudes[-1] / best.amplitudes[0] - ratio) < 1e-3


def test_mean_field_solutions():
    result = mean_field(3, 0.3)
    assert result.method == "enumeration"
    torch.testing.assert_close(torch.tensor(result.best.amplitudes).double(), hierarchical_amplitudes(3, 0.3))
    energies = [point.free_energy for point in result.points]
    assert energies == sorted(energies)
    assert mean_field(3, 0.3, 1.2).best.regime == "ergodic"
    # One dense pattern: m = tanh(m / T), and the free energy's derivative vanishes there.
    m = mean_field(1, 0.0, 0.7).best.amplitudes[0]
    assert abs(m - math.tanh(m / 0.7)) < 1e-9
    at = torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    image, energy = self_consistency(at, 0.4, 0.3)
    (gradient,) = torch.autograd.grad(energy, at)
    torch.testing.assert_close(gradient, (at - image).detach() / 0.6)


def test_learning():
    assert dataset_entropy(0.3, 41) == pytest.approx(0.91 / (41 * 0.09))
    assert examples_needed(0.3) == pytest.approx(0.91 / 0.09)
    # Alone, with binomials and their limit, the equations are the closed forms.
    exact = mean_field(1, 0.3, r=0.3, M=41)
    assert exact.method == "binomial"
    assert abs(exact.best.amplitudes[0] - single_pattern_learning(0.3, 41, 0.3)) < 1e-9
    limit = mean_field(1, 0.3, rho=dataset_entropy(0.3, 41)).best.amplitudes[0]
    assert abs(limit - single_pattern_learning(0.3, 41, 0.3, exact=False)) < 1e-9
    # Noise that spreads the field by quadrature is the closed form in the limit of none.
    cold = mean_field(3, 0.3, 0.02, rho=0.2).best.amplitudes
    assert max(abs(a - b) for a, b in zip(cold, mean_field(3, 0.3, rho=0.2).best.amplitudes, strict=True)) < 5e-3
    binomial = mean_field(2, 0.3, 0.1, r=0.5, M=(61, 31)).best.amplitudes
    normal = mean_field(2, 0.3, 0.1, rho=(dataset_entropy(0.5, 61), dataset_entropy(0.5, 31))).best.amplitudes
    assert max(abs(a - b) for a, b in zip(binomial, normal, strict=True)) < 0.01
    assert learning_curve(2, 0.3, 1.0, [3])[0].tolist() == pytest.approx([0.7, 0.21])
    assert bool((learning_curve(3, 0.3, 0.3, [5, 21])[:, 0].diff() > 0).all())


def test_unbalanced_examples_follow_theory():
    r, M = (0.9, 0.4), (21, 41)
    patterns = sparse_patterns(20_000, 2, 0.3)
    network = MultitaskingHopfield("supervised").fit(*example_set(patterns, r, M), quality=r)
    m = network.relax(fill_blanks(patterns[0], 4), 8, patterns=patterns).magnetisations[-1].abs().mean(0)
    assert float((m - learning_curve(2, 0.3, r, [M])[0]).abs().max()) < 0.02


def test_regimes_and_phase_diagram():
    assert regime([0.01, 0.02, 0.0], 0.3, N=2000) == "ergodic"
    assert regime([0.7, 0.001], 0.3) == regime([0.7], 0.3) == "pure"
    assert regime([0.09, -0.1], 0.9) == "hierarchical"
    assert regime([0.1, 0.1], 0.9) == "parallel"
    diagram = phase_diagram(3, [0.3, 0.9], [0.0, 0.2, 1.2])
    assert diagram.regimes[0][0] == "hierarchical"
    assert diagram.regimes[1][1] == "parallel"
    assert [line[2] for line in diagram.regimes] == ["ergodic"] * 2
    assert diagram.amplitudes.shape == (2, 3, 3)
    assert diagram.plot().axes


def test_many_patterns_are_sampled_with_a_warning(monkeypatch):
    monkeypatch.setattr("torchfolio.theory.hopfield_equations.ENUMERATED", 100)
    monkeypatch.setattr("torchfolio.theory.hopfield_equations.SAMPLED", 40_000)
    with pytest.warns(UserWarning, match=r"3\^5 columns"):
        result = mean_field(5, 0.2, n_starts=8)
    assert result.method == "sampling"
    assert result.best.amplitudes[:2] == pytest.approx([0.8, 0.16], abs=0.01)


def test_to_ternary():
    x = torch.tensor([[0.1, 5.0, -3.0, 0.2, 0.15, 9.0, -8.0, 0.0]])
    assert to_ternary(x, 0.5).tolist() == [[0, 1, -1, 0, 0, 1, -1, 0]]


# Refusals

PATTERNS = torch.tensor([[1.0, 0, -1, 1], [0, 1, 1, -1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultitaskingHopfield("hebb"), "rule"),  # pyright: ignore[reportArgumentType]
        (lambda: MultitaskingHopfield(temperature=float("nan")), "temperature"),
        (lambda: MultitaskingHopfield().fit(PATTERNS * 0.5), "entries -1, 0 and 1"),
        (lambda: MultitaskingHopfield().fit(PATTERNS * float("nan")), "entries -1, 0 and 1"),
        (lambda: MultitaskingHopfield().fit(torch.tensor([[1.0, 1], [0, 0]])), "all blank"),
        (lambda: MultitaskingHopfield().fit(PATTERNS[:0]), "expected patterns"),
        (lambda: MultitaskingHopfield("supervised").fit(PATTERNS), "expected labels"),
        (lambda: MultitaskingHopfield("unsupervised").fit(PATTERNS, torch.tensor([0, 1])), "expected no labels"),
        (lambda: MultitaskingHopfield("supervised").fit(PATTERNS, torch.tensor([0, 2])), "labels 0..K-1"),
        (lambda: MultitaskingHopfield("supervised").fit(PATTERNS, torch.tensor([0.0, 1])), "integer labels"),
        (lambda: MultitaskingHopfield("unsupervised").fit(PATTERNS, quality=0.0), "quality r"),
        (lambda: MultitaskingHopfield().energy(PATTERNS), "call fit first"),
        (lambda: MultitaskingHopfield().fit(PATTERNS).relax(PATTERNS), "states"),
        (lambda: MultitaskingHopfield().fit(PATTERNS).relax(torch.ones(1, 4), -1), "sweeps"),
        (lambda: example_set(PATTERNS, 0.0, 3), "quality r"),
        (lambda: example_set(PATTERNS, 0.5, 0), "at least 1"),
        (lambda: sparse_patterns(10, 2, 1.0), "dilution"),
        (lambda: critical_dilution(2.5), "whole number"),
        (lambda: mean_field(3, 0.3, float("nan")), "noise T"),
        (lambda: mean_field(3, 0.3, r=0.0, M=3), "quality r"),
        (lambda: mean_field(3, 0.3, r=0.5), "both r and M"),
        (lambda: mean_field(3, 0.3, rho=(0.1, 0.2)), "one number or 3"),
        (lambda: to_ternary(torch.tensor([[1.0, float("nan")]]), 0.3), "NaN|finite"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_quality_is_measured_where_examples_cancel():
    patterns = sparse_patterns(20_000, 2, 0.3, seed=0)
    examples, labels = example_set(patterns, r=0.3, M=2, seed=0)
    network = MultitaskingHopfield("supervised").fit(examples, labels)
    power = 1 / (network.weights * network.N * (examples != 0).double().mean())
    assert torch.allclose(power, torch.full_like(power, 0.09 + 0.91 / 2), atol=0.02)


def test_points_of_the_diagram_where_nothing_has_converged_are_named(monkeypatch):
    from torchfolio.theory import hopfield_phases

    whole = hopfield_phases.solve
    wanted = phase_diagram(3, [0.3], [0.2, 0.5])

    def cut(*arguments, **settings):
        m, energy, converged = whole(*arguments, **settings)
        converged[0, 1] = False
        return m, energy, converged

    monkeypatch.setattr(hopfield_phases, "solve", cut)
    with pytest.warns(UserWarning, match=r"no start has converged at 1 of 2 points, first at d = 0\.3, T = 0\.5"):
        found = phase_diagram(3, [0.3], [0.2, 0.5])
    torch.testing.assert_close(found.amplitudes, wanted.amplitudes)  # the lowest energy, not the first start
