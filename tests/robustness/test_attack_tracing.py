"""Traced copies: what separation promises exactly, and that tracing is the same whoever asks how."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.robustness import hop_skip_jump, nes, pgd
from torchfolio.robustness.attack_tracing import TracedCopy, Tracer, separate, trace, transfer_matrix, trial, utility
from torchfolio.robustness.tracing_noise import KeyedNoise, RandomNoise

_X, _Y = load_digits(return_X_y=True)
X, Y = torch.from_numpy(_X / 16).float(), torch.from_numpy(_Y)
PGD = partial(pgd, eps=0.15, alpha=0.03, steps=15, clip=(0.0, 1.0))


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10))
    fit(net, (X[:1400], Y[:1400]), optimizer=adam(5e-3), epochs=8)
    net.zero_grad()
    return net.train()


@pytest.fixture(scope="module")
def copies(classifier):
    return separate(classifier, (X[:1400], Y[:1400]), keys=[11, 12, 13], steps=300, seed=1)


def test_separation_leaves_the_classifier_alone(classifier):
    before = {name: t.clone() for name, t in classifier.state_dict().items()}
    modes = [m.training for m in classifier.modules()]
    state = torch.get_rng_state()
    made = separate(classifier, (X, Y), n_copies=2, steps=3)
    assert all(torch.equal(t, before[name]) for name, t in classifier.state_dict().items())
    assert [m.training for m in classifier.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in classifier.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert made[0].classifier is made[1].classifier
    assert next(made[0].classifier.parameters()) is next(classifier.parameters())  # no second copy of the weights
    made[0].train()(X[:8])
    assert torch.equal(classifier[1].running_mean, before["1.running_mean"])


def test_each_batch_asks_the_classifier_once():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    net = Counting(64, 10)
    separate(net, DataLoader(TensorDataset(X[:128], Y[:128]), 32), n_copies=5, steps=4)
    streamed = calls[1:]  # the first call looks at the number of classes
    assert streamed == [32] * 4
    calls.clear()
    separate(net, (X[:128], Y[:128]), n_copies=5, steps=40)
    assert calls == [2, 128]  # examples in memory: once for all steps


@pytest.mark.parametrize("kind", ["vector", "image"])
@pytest.mark.parametrize("noise", ["keyed", "random", None])
def test_together_and_one_by_one_give_the_same_weights(kind, noise):
    x = X.double() if kind == "vector" else X.double().view(-1, 1, 8, 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    settings = {"keys": [5, 6, 7], "steps": 12, "noise": noise}
    ways = [separate(net, (x, Y), vectorize=v, **settings) for v in (True, False)]
    for a, b in zip(*ways, strict=True):
        for p, q in zip(a.tracer.parameters(), b.tracer.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=0)
    # A copy is a matter of its key alone, not of its place among the others.
    alone = separate(net, (x, Y), vectorize=False, **{**settings, "keys": [7, 1]})[0]
    torch.testing.assert_close(alone.tracer.state_dict(), ways[1][2].tracer.state_dict())


def test_a_bounded_tracer_changes_no_confident_decision(copies, classifier):
    classifier.eval()
    x = torch.rand(2000, 64) * 3 - 1
    logits = classifier(x).detach()
    classifier.train()
    top = logits.topk(2, 1).values
    sure = top[:, 0] - top[:, 1] > 2 * copies[0].alpha
    assert 0 < sure.sum() < len(x)
    for made in copies:
        assert torch.equal(made(x).argmax(1)[sure], logits.argmax(1)[sure])
    none = TracedCopy(copies[0].classifier, copies[0].tracer, alpha=0.0)
    assert torch.equal(none(x), logits)


def test_copies_work_and_are_told_apart(copies, classifier):
    worth = utility(copies, classifier, (X[1400:], Y[1400:]))
    assert worth.worst_loss <= 0.05
    assert worth.mean_loss <= worth.worst_loss
    found = trial(copies, partial(PGD, generator=torch.Generator().manual_seed(0)), (X[1400:1600], Y[1400:1600]))
    assert found.success.float().mean() > 0.5
    assert found.accuracy > 0.75
    assert found.transfer.shape == (3, 3)
    torch.testing.assert_close(found.transfer.diagonal(), found.success.double().mean(1))
    pooled = [trace(copies, x, label=found.label).pooled() for x in found.x_adv]
    assert [int(p.source) for p in pooled] == [0, 1, 2]
    assert not any(bool(p.inconclusive) for p in pooled)
    matrix = transfer_matrix(
        copies, partial(PGD, generator=torch.Generator().manual_seed(0)), (X[1400:1600], Y[1400:1600])
    )
    assert torch.equal(matrix, found.transfer)


@pytest.mark.parametrize(
    "attack", [partial(nes, eps=0.3, step=0.03, steps=10), partial(hop_skip_jump, max_queries=400)]
)
def test_attacks_by_queries_are_traced(copies, attack):
    attack = partial(attack, clip=(0.0, 1.0), generator=torch.Generator().manual_seed(0))
    found = trial(copies, attack, (X[1400:1430], Y[1400:1430]), sources=[2])
    assert found.queries > 0
    assert found.accuracy > 0.5


def test_tracing_is_equivariant_and_the_same_for_each_example(copies):
    x, y = X[1400:1420] + 0.1 * torch.randn(20, 64, generator=torch.Generator().manual_seed(3)).sign(), Y[1400:1420]
    straight = trace(copies, x, label=y)
    order = [2, 0, 1]
    turned = trace([copies[k] for k in order], x, label=y)
    assert torch.equal(turned.scores, straight.scores[:, order])
    assert torch.equal(torch.tensor(order)[turned.source], straight.source)
    assert torch.equal(turned.margin, straight.margin)
    single = [trace(copies, x[k : k + 1], label=y[k : k + 1]) for k in range(20)]
    torch.testing.assert_close(torch.cat([s.scores for s in single]), straight.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(straight.confidence.sum(1), torch.ones(20))


class Fixed(nn.Module):
    """Answers a constant."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return self.values.expand(len(x), -1)


def fixed(*tracers, base=(1.0, 0.0, 0.0), bounded=False):
    classifier = Fixed(*base)
    return [TracedCopy(classifier, Tracer(Fixed(*t), bounded), alpha=1.0) for t in tracers]


def test_scores_and_classes_are_as_written():
    x = torch.zeros(1, 4)
    three = fixed((0.0, 0.5, 0.0), (-1.0, 1.0, 0.0), (0.0, 0.0, 0.0))
    found = trace(three, x, label=0)
    assert found.target.item() == 1  # the second copy alone is fooled
    torch.testing.assert_close(found.scores, torch.tensor([[0.5, 2.0, 0.0]]))
    assert (found.source.item(), found.margin.item(), found.inconclusive.item()) == (1, 1.5, False)
    assert found.fooled.tolist() == [[False, True, False]]
    assert torch.equal(trace(three, x).scores, found.scores)  # the label is the classifier's answer
    assert trace(three, x, label=0, require_fooled=True).scores[0, [0, 2]].tolist() == [-torch.inf] * 2
    assert trace(three, x, label=0, target=2).scores.tolist() == [[0.0, 1.0, 0.0]]
    # The classifier itself is fooled: the label is its second answer.
    assert trace(three, x, target=0).label.item() == 1
    # Nobody is fooled: each copy's own runner-up, and nothing is concluded.
    quiet = fixed((0.0, 0.1, 0.0), (0.0, 0.0, 0.3))
    found = trace(quiet, x, label=0)
    torch.testing.assert_close(found.scores, torch.tensor([[0.1, 0.3]]))
    assert found.inconclusive.item()
    assert found.pooled().inconclusive.item()
    assert trace(quiet, x).inconclusive.item()


def test_saturated_tracers_are_decided_before_the_tanh_and_equal_ones_not_at_all(copies):
    x = torch.zeros(1, 4)
    found = trace(fixed((-20.0, 20.0, 0.0), (-30.0, 30.0, 0.0), bounded=True), x, label=0)
    assert found.margin.item() == 0
    assert (found.source.item(), found.inconclusive.item()) == (1, False)
    shared = trace([copies[0]] * 3, X[1400:1500] * 0.5, label=Y[1400:1500])
    assert shared.inconclusive.all()
    assert (shared.margin == 0).all()


def test_keyed_noise_leans_to_its_patterns():
    noise = KeyedNoise(3, (400,), 5, 0.1, 0.5, 3.0, None)
    x = torch.full((4000, 400), 0.5)
    noisy, c = noise(x)
    sign = (noisy - x).sign()
    torch.testing.assert_close((noisy - x).abs(), torch.full_like(x, 0.1))
    up = torch.stack([(sign[c == k] > 0).float().mean(0) for k in range(5)])
    assert (up - noise.chances).abs().max() < 0.1
    draws = 0.5 * torch.special.ndtri(torch.tensor(0.9)) + 0.75**0.5 * torch.randn(200_000)
    slope = torch.tensor(0.5 / 0.75**0.5)
    assert abs((draws > 0).float().mean() - torch.special.ndtr(slope * torch.special.ndtri(torch.tensor(0.9)))) < 0.01
    assert abs((RandomNoise(3, (400,), 5, 0.1, 0.5, 3.0, None)(x)[0] > x).float().mean() - 0.5) < 0.01
    assert float(KeyedNoise(3, (400,), 5, 0.5, 1.0, 3.0, (0.25, 0.75))(x)[0].max()) == 0.75


def test_weight_by_the_margins_and_labels_by_the_model(classifier):
    made = separate(
        classifier, DataLoader(TensorDataset(X[:300]), 100), n_copies=2, steps=2, alpha="auto", labels="model"
    )
    logits = copies_base(made, X[:300])
    top = logits.topk(2, 1).values
    assert made[0].alpha == pytest.approx(float((top[:, 0] - top[:, 1]).median()) / 2, rel=1e-5)


def copies_base(made, x):
    with torch.no_grad():
        return made[0].classifier(x)


def test_own_tracers_and_other_precisions():
    net = nn.Linear(64, 10).to(torch.bfloat16)
    made = separate(net, (X.bfloat16(), Y), n_copies=2, steps=2, tracer=lambda seed: nn.Linear(64, 10), bounded=False)
    assert made[0](X[:3].bfloat16()).dtype == torch.bfloat16
    normed = separate(
        nn.Linear(64, 10), (X, Y), n_copies=2, steps=2, vectorize=True,
        tracer=lambda seed: nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)),
    )  # fmt: skip
    assert normed[0].tracer.body[1].num_batches_tracked == 2  # trained one by one, as its statistics need
    again = pickle.loads(pickle.dumps(made[0]))
    assert torch.equal(again(X[:3].bfloat16()), made[0](X[:3].bfloat16()))
    assert {name.split(".")[0] for name in made[0].state_dict()} == {"classifier", "tracer"}
    other = copy.deepcopy(made[1])
    other.load_state_dict(made[0].state_dict())
    assert torch.equal(other(X[:3].bfloat16()), made[0](X[:3].bfloat16()))
    assert "alpha=4" in repr(made[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_copies": 1}, "two keys or more"),
        ({"keys": [3, 3]}, "all different"),
        ({"keys": [1, 2], "n_copies": 2}, "exactly one"),
        ({"n_copies": 2, "share": float("nan")}, "share"),
        ({"n_copies": 2, "noise": "kyed"}, "did you mean 'keyed'"),
        ({"n_copies": 2, "sigma": 0.0}, "sigma"),
        ({"n_copies": 2, "alpha": -1.0}, "alpha"),
        ({"n_copies": 2, "clip": (0.0, 0.5)}, "clip, or None"),
        ({"n_copies": 2, "tracer": lambda seed: nn.Linear(64, 3)}, "10 outputs"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        separate(nn.Linear(64, 10), (X[:64], Y[:64]), steps=1, **settings)


def test_what_cannot_be_traced_is_refused(copies):
    with pytest.raises(ValueError, match="two copies"):
        trace(copies[:1], X[:2])
    with pytest.raises(ValueError, match="NaN"):
        trace(copies, X[:2] * torch.nan)
    with pytest.raises(ValueError, match="target is their label"):
        trace(copies, X[:2], label=1, target=1)
    with pytest.raises(ValueError, match="from 0 to 9"):
        trace(copies, X[:2], label=10)
    with pytest.raises(ValueError, match="of one classifier"):
        trace([*copies, TracedCopy(nn.Linear(64, 10), copies[0].tracer)], X[:2])
    with pytest.raises(ValueError, match="logits"):
        separate(nn.Flatten(0), (X[:64], Y[:64]), n_copies=2)
    with pytest.raises(ValueError, match='labels="model"'):
        separate(nn.Linear(64, 10), X, n_copies=2)
    with pytest.raises(ValueError, match="all copies get right"):
        trial(copies, PGD, (X[:1], (Y[:1] + 1) % 10))
