"""Utilities and probabilities: identities of maximum likelihood, rules that keep and change, fits that say what failed."""

from __future__ import annotations

import copy
import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.data import Examples
from torchfolio.insight.utility_probability import (
    Believability,
    argmax_decision,
    beam_search,
    fit_rationality,
    fit_temperature,
    frequency_from_utility,
    invariance_report,
    mbr_decision,
    paradox_report,
    rational_choice,
    regret_bounds,
    sample_decision,
    sample_sequences,
    utility_gradient,
    utility_regret,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(*shape, seed=0):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)), (6, 5)),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(12, 4)), (6, 1, 4, 4)),
    ],
    ids=["mlp", "conv"],
)  # fmt: skip
def test_the_step_of_maximum_likelihood_is_revealed_minus_expected(make, shape):
    torch.manual_seed(0)
    net = make().double()
    x, y = torch.randn(shape, dtype=torch.float64), torch.arange(6) % 4
    found = utility_gradient(net, x, y)
    expected = torch.autograd.grad(-F.cross_entropy(net(x), y), list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found.values(), expected, strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_the_sandwich_and_where_it_is_tight():
    u, y = logits(500, 7), torch.arange(500) % 7
    regret, loss, bound = regret_bounds(u, y)
    assert (regret <= loss + 1e-12).all()
    assert (loss <= bound + 1e-12).all()
    assert (regret >= 0).all()
    equal = regret_bounds(torch.zeros(3, 7, dtype=torch.float64), torch.tensor([0, 3, 6]))
    assert torch.allclose(equal[1], equal[2])
    alone = torch.full((2, 3), -1e6, dtype=torch.float64)
    alone[0, 1] = alone[1, 0] = 0
    sure = regret_bounds(alone, torch.tensor([1, 2]))
    assert torch.allclose(sure[0], sure[1])
    smooth = -rational_choice(u, 1e4).gather(1, y[:, None])[:, 0] / 1e4
    assert torch.allclose(smooth, utility_regret(u, y), atol=1e-3)


def test_utilities_store_the_surprise_of_the_data():
    g, truth = generator(1), torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    draws = torch.multinomial(truth, 10_000, replacement=True, generator=g)
    u, total, lr = logits(4), torch.zeros(4, dtype=torch.float64), 0.07
    start = u.clone()
    for y in draws:
        p = u.softmax(0)
        total += p
        u = u + lr * (F.one_hot(y, 4) - p)
    counts = frequency_from_utility(start, u, total, lr)
    assert (counts - draws.bincount(minlength=4)).abs().max() <= 1e-9 * 10_000
    assert counts.round().tolist() == draws.bincount(minlength=4).tolist()


def test_rational_choice_is_a_softmax():
    u = logits(5, 6)
    assert torch.allclose(rational_choice(u).exp(), u.softmax(-1))
    for kappa in (0.3, 4.0):
        assert torch.allclose(rational_choice(u, kappa).exp().sum(-1), torch.ones(5, dtype=torch.float64))
    rows = rational_choice(u, torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]))
    assert torch.allclose(rows[3], (4 * u[3]).log_softmax(-1))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rationality"):
            rational_choice(u, bad)


def test_rules_by_order_keep_and_rules_by_number_change():
    u = logits(300, 5)
    rules = {
        "argmax": argmax_decision,
        "top 3": lambda u: u.topk(3, dim=-1).indices,
        "sampling": lambda u: sample_decision(u, generator=generator()),
    }
    report = invariance_report(rules, u).set_index(["rule", "transform"])["invariant"]
    assert report["argmax"].all()
    assert report["top 3"].all()
    assert report["sampling", "u + 5"]
    assert not report["sampling", "3u"]
    assert not report["sampling", "rank"]


def chain(tokens):
    """A toy language: after 0 the tokens 1 or 2, then 2 likely ends (3)."""
    table = torch.tensor([[-9.0, 0.6, 0.4, -9.0], [-9.0, -1.0, 1.0, 0.9], [-9.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    return table[tokens[:, -1]]


def test_beam_search_finds_what_enumeration_finds():
    found = beam_search(chain, torch.tensor([0]), eos=3, beam=64, max_len=4)
    everything = {}

    def walk(tokens, total):
        if len(tokens) == 5 or tokens[-1] == 3:
            everything[tuple(tokens[1:])] = total
            return
        scores = rational_choice(chain(torch.tensor([tokens])).double())[0]
        for token in range(4):
            walk([*tokens, token], total + float(scores[token]))

    walk([0], 0.0)
    best = sorted(everything.items(), key=lambda pair: -pair[1])[:5]
    assert list(found.sequences[:5]) == [s for s, _ in best]
    assert found.totals[:5] == pytest.approx([t for _, t in best])
    greedy = sample_sequences(chain, torch.tensor([[0]]), 3, 4, rationality=float("inf"))
    assert tuple(greedy[0].tolist()) == beam_search(chain, torch.tensor([0]), 3, 1, 4).sequences[0]


def test_sampled_sequences_have_the_distribution_that_was_asked_for():
    kappas = torch.tensor([1.0, 3.0]).repeat_interleave(4000)
    drawn = sample_sequences(
        chain, torch.zeros(8000, 1, dtype=torch.int64), 3, 3, rationality=kappas, generator=generator()
    )
    for kappa, rows in ((1.0, drawn[:4000]), (3.0, drawn[4000:])):
        share = float((rows[:, 0] == 1).double().mean())
        assert share == pytest.approx(float(rational_choice(chain(torch.tensor([[0]])), kappa).exp()[0, 1]), abs=0.03)
    ended = (drawn == 3).cumsum(1) > 1
    assert not ended.any(), "nothing follows the end"


def test_minimum_risk_takes_the_candidate_nearest_to_the_others():
    closeness = lambda a, b: -abs(a - b)  # noqa: E731
    assert mbr_decision([0, 10, 11, 12], closeness) == 1
    assert mbr_decision([0, 10, 11, 12], closeness, [5.0, 1, 1, 1]) == 0
    assert mbr_decision([3, 3], closeness) == 0
    for bad in ([1.0], [-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="weights"):
            mbr_decision([1, 2], closeness, bad)
    with pytest.raises(ValueError, match="candidate"):
        mbr_decision([], closeness)


def test_fitting_by_decisions():
    fit = fit_rationality(lambda k: 1 - math.exp(-k), reference=1.0, tolerance=0.1)
    assert fit.reached
    assert fit.bisected
    assert -math.log(0.1) <= fit.kappa <= -math.log(0.1) * 1.03
    with pytest.warns(UserWarning, match="no rationality reaches"):
        failed = fit_rationality(lambda k: 0.2, reference=1.0)
    assert not failed.reached
    bumpy = {0.5: 0.9, 0.7: 0.2, 1.0: 1.0}
    with pytest.warns(UserWarning, match="falls"):
        grid = fit_rationality(lambda k: bumpy[k], reference=1.0, grid=(0.5, 0.7, 1.0))
    assert (grid.kappa, grid.bisected) == (1.0, False)
    for bad in ((), (1.0, 0.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match="grid"):
            fit_rationality(lambda k: k, reference=1.0, grid=bad)
    with pytest.raises(ValueError, match="metric"):
        fit_rationality(lambda k: float("nan"), reference=1.0)


def test_temperature_is_the_highest_likelihood():
    u = logits(4000, 5)
    y = torch.multinomial((1.7 * u).softmax(1), 1, generator=generator())[:, 0]
    kappa = fit_temperature(u, y)
    assert kappa == pytest.approx(1.7, abs=0.15)
    losses = [float(F.cross_entropy(k * u, y)) for k in (0.98 * kappa, kappa, 1.02 * kappa)]
    assert min(losses) == losses[1]


def test_history_and_panel():
    history = pd.DataFrame({"val_loss": [2.0, 1.0, 1.5], "val_accuracy": [0.5, 0.7, 0.72]})
    assert paradox_report(history) == pytest.approx({"best_epoch": 1, "loss_ratio": 1.5, "accuracy_change": 0.02})
    with pytest.raises(ValueError, match="val_accuracy"):
        paradox_report(history[["val_loss"]])
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(90, 4)
    panel = Believability().look(net, data=Examples((x, net(x).argmax(1))))
    assert panel.record["accuracy"] == 1.0
    assert "100.0%" in panel.sentences[0]
    with pytest.raises(ValueError, match="needs a classifier"):
        Believability().look(nn.Linear(4, 3), data=Examples((x, torch.randn(90, 3))))
    with pytest.raises(ValueError, match="two alternatives"):
        utility_regret(torch.zeros(3), torch.zeros(3, dtype=torch.int64))


def test_what_makes_no_sense_is_told_and_masked_tokens_are_none_of_it():
    u, y = torch.randn(6, 4), torch.arange(6) % 4
    bad = u.masked_fill(torch.eye(6, 4, dtype=torch.bool), torch.nan)
    step = lambda tokens: u[: len(tokens)]  # noqa: E731
    cases = [
        (lambda: utility_regret(bad, y), "got NaN"),
        (lambda: rational_choice(bad), "got NaN"),
        (lambda: argmax_decision(bad), "got NaN"),
        (lambda: sample_decision(bad), "got NaN"),
        (lambda: invariance_report(argmax_decision, bad), "got NaN"),
        (lambda: beam_search(lambda t: bad[:1], torch.tensor([0]), 1, 2, 3), "got NaN"),
        (lambda: beam_search(step, torch.tensor([[0]]), 1, 2, 3), r"token numbers \[P\]"),
        (lambda: sample_sequences(step, torch.tensor([0]), 1, 3), r"token numbers \[B, P\]"),
        (lambda: sample_sequences(step, torch.tensor([[0.0]]), 1, 3), "token numbers"),
        (lambda: sample_sequences(lambda t: u[None], torch.tensor([[0]]), 1, 3), r"logits \[1, V\]"),
        (lambda: mbr_decision(["a", "b"], lambda a, b: math.nan), "finite"),
        (lambda: frequency_from_utility(torch.zeros(3), torch.zeros(4), torch.zeros(3), 0.1), "one shape"),
        (lambda: paradox_report(pd.DataFrame({"val_loss": [1, math.nan], "val_accuracy": [0, 1]})), "finite"),
        (lambda: utility_gradient(nn.Linear(4, 4).requires_grad_(False), u, y), "requires a gradient"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    masked = u.masked_fill(torch.eye(6, 4, dtype=torch.bool), -math.inf)
    assert torch.allclose(rational_choice(masked, 2.0).exp().sum(1), torch.ones(6))
    assert not (sample_decision(masked, generator=torch.Generator().manual_seed(0))[:4] == torch.arange(4)).any()


def test_the_direction_leaves_statistics_of_batches():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).train()
    before = copy.deepcopy(net.state_dict())
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    utility_gradient(net, x, y)
    assert set(utility_gradient(copy.deepcopy(net).eval(), x, y)) == set(dict(net.named_parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert net.training
