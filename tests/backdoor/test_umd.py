"""Pairs that work for each other are found exactly, the threshold is that of a maximum, and triggers reach their share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from tests.contracts.detectors import check_model_detector
from torchfolio.backdoor import AllToOne
from torchfolio.backdoor.pair_clustering import objective
from torchfolio.backdoor.pair_triggers import AdditiveInversion, PairTriggers, PatchInversion
from torchfolio.backdoor.triggers import AdditiveTrigger
from torchfolio.backdoor.umd import UMD, UMDVerdict, core_periphery, order_statistic_score, transfer_matrix
from torchfolio.backdoor.victims import victim
from torchfolio.data import load

PAIRS = [(s, t) for s in range(5) for t in range(5) if s != t]
SOURCES = [s for s, _ in PAIRS]
PLANTED = [PAIRS.index(pair) for pair in ((0, 3), (1, 3), (2, 0), (4, 1))]


def planted(noise: float = 0.0, seed: int = 0) -> np.ndarray:
    A = noise * np.random.default_rng(seed).random((20, 20))
    A[np.ix_(PLANTED, PLANTED)] = 1
    np.fill_diagonal(A, 0)
    return A


def mlp(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, classes))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)  # as sure as a trained one
    return net


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_planted_set_is_found(noise):
    core = core_periphery(planted(noise), SOURCES)
    assert set(core.members) == set(PLANTED)
    if not noise:
        assert core.H == 1
    assert pytest.approx(objective(planted(noise), core.members)) == core.H


def test_constant_transfers_have_no_core():
    A = np.full((20, 20), 0.4)
    np.fill_diagonal(A, 0)
    core = core_periphery(A, SOURCES)
    assert pytest.approx(0) == core.H
    assert len({SOURCES[k] for k in core.members}) == len(core.members) >= 2


def test_the_search_climbs_as_by_hand():
    A = np.random.default_rng(3).random((12, 12))
    np.fill_diagonal(A, 0)
    sources = [k // 3 for k in range(12)]
    core = core_periphery(A, sources, n_init=66)
    best = -math.inf
    for i in range(12):
        for j in range(i + 1, 12):
            members = [i, j]
            if sources[i] == sources[j]:
                continue
            while True:
                best = max(best, objective(A, members))
                taken = {sources[k] for k in members}
                free = [c for c in range(12) if sources[c] not in taken]
                if not free:
                    break
                members.append(max(free, key=lambda c: objective(A, [*members, c])))
    assert pytest.approx(best) == core.H
    assert core_periphery(torch.from_numpy(A), sources, n_init=66) == core


def test_the_threshold_is_that_of_the_largest_of_many():
    for count, expected in ((80, 3.2200), (90, 3.2536)):
        r = np.linspace(1, 2, count + 2)
        assert order_statistic_score(r, [0, 1])[1] == pytest.approx(expected, abs=1e-3)
        assert norm.cdf(expected) ** count == pytest.approx(0.95, abs=1e-3)
    largest = np.random.default_rng(0).standard_normal((20_000, 80)).max(1)
    assert abs((largest > order_statistic_score(np.linspace(1, 2, 82), [0, 1])[1]).mean() - 0.05) < 0.01


def test_the_score_knows_no_unit_and_leaves_the_whole_core_out():
    r = np.random.default_rng(1).random(20) + 0.5
    r[[0, 7]] = 9.0
    z, _ = order_statistic_score(r, [0, 7])
    assert order_statistic_score(r / 13, [0, 7])[0] == pytest.approx(z)
    null = np.delete(r, [0, 7])
    by_hand = (9 - np.median(null)) / (1.4826 * np.median(abs(null - np.median(null))))
    assert z == pytest.approx(by_hand)
    assert order_statistic_score(np.r_[2.0, 2.0, np.ones(8)], [0, 1])[0] == math.inf
    assert order_statistic_score(np.ones(10), [0, 1])[0] == 0


@pytest.mark.parametrize("kind", ["additive", "patch"])
def test_triggers_reach_their_share_and_batches_equal_loops(kind):
    net = mlp().eval()
    images = torch.rand(4, 6, 3, 4, 4)
    settings = {"pi": 0.8, "steps": 60 if kind == "additive" else 500}
    make = {"additive": lambda: AdditiveInversion(**settings), "patch": lambda: PatchInversion(1, **settings)}[kind]
    pairs = [(0, 1), (1, 2), (3, 0)]
    found = make().estimate(net, images, pairs, torch.Generator().manual_seed(0))
    assert found.sizes.isfinite().any()
    for k, (s, t) in enumerate(pairs):
        share = float((net(found.apply(k, images[s])).argmax(1) == t).double().mean())
        assert (share >= 0.8) == bool(found.sizes[k].isfinite())
        torch.testing.assert_close(found.trigger(k)(images[s]), found.apply(k, images[s]))
    size = found.patterns.flatten(1).norm(dim=1) if found.masks is None else found.masks.flatten(1).sum(1)
    reached = found.sizes.isfinite()
    torch.testing.assert_close(size[reached], found.sizes[reached])
    if kind == "additive":
        alone = PairTriggers.joined([AdditiveInversion(**settings, chunk=6).estimate(net, images, [p]) for p in pairs])
        torch.testing.assert_close(alone.sizes, found.sizes)
        torch.testing.assert_close(alone.patterns, found.patterns, atol=1e-5, rtol=0)
        double = make().estimate(net.double(), images.double(), pairs)
        assert double.patterns.dtype == torch.float64


def test_a_pair_that_is_not_reached_is_infinite():
    last = nn.Linear(48, 3)
    net = nn.Sequential(nn.Flatten(), last)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, 0, 0]))
    images = torch.rand(3, 4, 3, 4, 4)
    found = AdditiveInversion(steps=5).estimate(net, images, [(1, 2), (1, 0)])
    assert found.sizes.tolist() == [math.inf, 0]
    with pytest.warns(UserWarning, match="no trigger"):
        UMD(steps=5).invert(net, images[1], 2)
    patch = PatchInversion(2, steps=3).estimate(net, images, [(1, 2)], torch.Generator().manual_seed(0))
    assert patch.sizes.tolist() == [math.inf]
    assert patch.masks is not None
    assert 0 <= float(patch.masks.min()) <= float(patch.masks.max()) <= 1


def test_transfers_are_shares():
    net, images = mlp().eval(), torch.rand(4, 6, 3, 4, 4)
    pairs = [(0, 1), (1, 2), (0, 3)]
    triggers = AdditiveInversion(steps=20).estimate(net, images, pairs)
    A = transfer_matrix(net, triggers, images)
    for i in range(3):
        for j, (s, t) in enumerate(pairs):
            share = float((net(triggers.apply(i, images[s])).argmax(1) == t).double().mean())
            assert A[i, j] == pytest.approx(0 if i == j else share)


@pytest.fixture(scope="module")
def victims():
    data = load("digits", normalize=False, val=0)
    trigger, labels = AdditiveTrigger.shape("chessboard", data.shape, 0.1), AllToOne(2, 10)
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))  # noqa: E731
    bad, clean = (
        victim(data, trigger, labels, rate=rate, epochs=10, lr=0.1, mode="append", seed=0, net=net) for rate in (0.3, 0)
    )
    return data, bad, clean


@pytest.mark.filterwarnings("ignore:only")
def test_a_backdoor_is_found_with_its_pairs_and_a_clean_network_passes(victims):
    data, bad, clean = victims
    examples = tuple(t[:] for t in data.test.tensors)
    verdict = check_model_detector(UMD, bad.model, examples)
    assert isinstance(verdict, UMDVerdict)
    assert verdict.is_backdoored
    assert sum(t == 2 for _, t in verdict.pairs) >= 8
    assert verdict.sizes.shape == (10, 10)
    assert verdict.trigger.delta.norm() < 2
    said = " ".join(verdict.sentences([f"digit {k}" for k in range(10)]))
    assert "to digit 2" in said
    assert "with probability" in said
    assert len(UMD().pictures(verdict, [str(k) for k in range(10)])) == 2
    other = check_model_detector(UMD, clean.model, examples)
    assert not other.is_backdoored
    assert other.pairs == ()
    assert isinstance(other, UMDVerdict)
    assert len(other.core) >= 2
    few = UMD(max_pairs=40, mode="both", trials=1, steps=20).scan(bad.model, examples)
    assert few.evidence["pairs_tried"] == 40


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UMD("additiv"), "did you mean"),  # pyright: ignore[reportArgumentType]
        (lambda: UMD(pi=0.0), "pi"),
        (lambda: UMD(confidence=float("nan")), "confidence"),
        (lambda: AdditiveInversion(step=0.0), "step"),
        (lambda: core_periphery(np.zeros((3, 2)), [0, 1, 2]), "transfers"),
        (lambda: core_periphery(np.full((3, 3), np.nan), [0, 1, 2]), "finite"),
        (lambda: core_periphery(np.zeros((3, 3)), [1, 1, 1]), "one pair cannot be seen"),
        (lambda: order_statistic_score(np.ones(3), [0, 1, 2]), "some of 3"),
        (lambda: AdditiveInversion().estimate(mlp(), torch.rand(4, 2, 3, 4, 4), []), "at least one pair"),
        (lambda: AdditiveInversion().estimate(mlp(), torch.rand(4, 2, 3, 4, 4), [(1, 1)]), "different classes"),
        (lambda: AdditiveInversion().estimate(mlp(), torch.rand(4, 2, 3, 4, 4) + 1, [(0, 1)]), r"\[0, 1\]"),
        (lambda: UMD().scan(mlp(2), (torch.rand(40, 3, 4, 4), torch.arange(40) % 2)), "at least 3 classes"),
        (lambda: UMD().scan(mlp(), torch.rand(12, 3, 4, 4)), "more than 10 images"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
