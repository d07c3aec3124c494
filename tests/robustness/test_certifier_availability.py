"""Certifiers against samples, attacks and closed forms; poison by its rules; attacks on certificates, and their audit."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from tests.contracts.objectives import check_objective
from tests.contracts.rules import check_rule
from torchfolio.backdoor import PatchTrigger
from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.robustness import Box, classification, pgd
from torchfolio.robustness.bounds import crown, ibp
from torchfolio.robustness.certifier_availability import (
    AbstainingClassifier,
    AvailabilityBackdoor,
    BallConflict,
    CertifiedIBP,
    CrownCertifier,
    GaussianNoise,
    IntervalCertifier,
    LabelConflict,
    LabelSplit,
    SmoothedBackdoor,
    SmoothingCertifier,
    TargetLabel,
    availability_report,
    bars,
    find_abstaining,
    poison,
)
from torchfolio.robustness.certifiers import clopper_pearson
from torchfolio.robustness.margins import crown_margins, interval_margins

_X, _Y = load_digits(return_X_y=True)
X, Y = torch.from_numpy(_X / 16).float().view(-1, 1, 8, 8), torch.from_numpy(_Y)


def networks():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.uniform_(-0.2, 0.2)
    norm.running_var.uniform_(0.5, 2)
    return {
        "relu": nn.Sequential(
            nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 10)
        ),
        "tanh": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)),
        "sigmoid": nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.Sigmoid(), nn.Dropout(), nn.Linear(16, 10), nn.Tanh()
        ),
        "conv": nn.Sequential(
            nn.Conv2d(1, 3, 3, 2, 1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Identity(), nn.Linear(12, 10)
        ),
    }


NETWORKS = networks()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    fit(net, (X[:1400], Y[:1400]), rule=CertifiedIBP(0.05, (20, 110)), optimizer=adam(5e-3), epochs=10)
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_lie_below_every_margin(name):
    net = NETWORKS[name].double().eval()
    x, y = X[:6].double(), Y[:6]
    box = Box.ball(x, 0.08)
    generator = torch.Generator().manual_seed(1)
    bounds = {"interval": interval_margins(net, box, y), "crown": crown_margins(net, box, y)}
    assert (bounds["crown"] >= bounds["interval"]).all()
    points = box.lower + (box.upper - box.lower) * torch.rand(1000, *x.shape, generator=generator, dtype=x.dtype)
    with torch.no_grad():
        z = net(points.flatten(0, 1)).view(1000, 6, 10)
        found = pgd(net, x, y, eps=0.08, alpha=0.02, steps=20, clip=(0.0, 1.0), generator=generator)
    attacked = net(found.x_adv).detach()
    for values in (*z, attacked):
        margins = values.gather(1, y[:, None]) - values
        for lower in bounds.values():
            assert (lower <= margins + 1e-9).all()
    assert (bounds["crown"].gather(1, y[:, None]) == 0).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_margins_are_those_of_properties_and_exact_at_a_point(name):
    net = NETWORKS[name].double().eval()
    x, y = X[:5].double(), Y[:5]
    box = Box.ball(x, 0.05)
    for k in range(5):
        rest = [j for j in range(10) if j != int(y[k])]
        rows = slice(k, k + 1)
        prop = classification(int(y[k]), 10)
        lower = ibp(net, box[rows], prop).lower[0]
        torch.testing.assert_close(interval_margins(net, box, y)[k, rest], lower)
        linear = torch.maximum(crown(net, box[rows], prop).lower[0], lower)
        torch.testing.assert_close(crown_margins(net, box[rows], y[rows])[0, rest], linear)
    z = net(x)
    for bound in (interval_margins, crown_margins):
        torch.testing.assert_close(bound(net, Box.ball(x, 0.0), y), z.gather(1, y[:, None]) - z)


def test_many_classes_label_by_label():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 50)).double()
    x, y = torch.rand(9, 6).double(), torch.randint(50, (9,))
    lower = interval_margins(net, Box.ball(x, 0.1), y)
    for k in range(9):
        want = ibp(net, Box.ball(x[k : k + 1], 0.1), classification(int(y[k]), 50)).lower[0]
        torch.testing.assert_close(lower[k, [j for j in range(50) if j != int(y[k])]], want)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: interval_margins(net, Box.ball(v, 0.1, None), y), x)


def test_crown_is_exact_without_unstable_units():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    with torch.no_grad():
        net[0].bias += torch.tensor([9.0, -9.0] * 3 + [9.0])  # each unit on or off on the whole ball
    x, y = torch.rand(8, 5).double(), torch.arange(8) % 4
    eps = 0.2
    on = (net[0].bias > 0).double()
    W = net[2].weight * on @ net[0].weight
    z = net(x)
    exact = z.gather(1, y[:, None]) - z - eps * (W[y][:, None] - W).abs().sum(2)
    torch.testing.assert_close(crown_margins(net, Box.ball(x, eps, None), y), exact)


@pytest.mark.parametrize("kind", [IntervalCertifier, CrownCertifier])
def test_certificates_shrink_with_the_radius_and_hold_under_attack(trained, kind):
    x = X[1400:1500]
    before = None
    for eps in (0.0, 0.01, 0.03, 0.06, 0.2):
        found = kind(trained, eps).certify(x)
        assert torch.equal(found.prediction, trained.eval()(x).argmax(1))
        assert before is None or not bool((found.certified & ~before).any()) or kind is CrownCertifier
        before = found.certified
        rows = found.certified
        if eps and bool(rows.any()):
            attack = pgd(
                trained, x[rows], found.prediction[rows], eps=eps, alpha=eps / 4, steps=15, clip=(0.0, 1.0), restarts=2
            )
            assert not attack.success.any()
    assert kind(trained, 0.0).certify(x).certified.all()
    single = kind(trained, 0.03, dtype=torch.float32)
    assert single.certify(x).certified.sum() <= kind(trained, 0.03).certify(x).certified.sum()
    assert torch.equal(
        torch.cat([single.certify(row[None]).certified for row in x[:9]]), single.certify(x[:9]).certified
    )


def test_a_wider_certificate_rules_out_evasion(trained):
    x, eps, eta = X[1400:1500], 0.02, 0.02
    certifier = IntervalCertifier(trained, eps)
    wide = IntervalCertifier(trained, eps + eta).certify(x).certified
    found = find_abstaining(certifier, x, eta, steps=10)
    assert wide.any()
    assert not found.abstains[wide].any()
    own = certifier.certify(x).certified
    assert (found.abstains & own).any()  # some that were certified are led to a point that is not
    assert (found.x - x).abs().max() <= eta + 1e-6
    assert found.x.min() >= 0
    assert find_abstaining(certifier, x, 0.0).abstains.equal(~own)
    linear = find_abstaining(CrownCertifier(trained, eps), x[:20], eta, steps=3)
    assert linear.x.shape == x[:20].shape
    with pytest.raises(TypeError, match="by bounds"):
        find_abstaining(SmoothingCertifier(trained, 0.2, 0.1), x, eta)


def test_the_confidence_bound():
    n, alpha = 500, 0.001
    p = clopper_pearson(torch.tensor([0, 250, 499, n]), n, alpha)
    assert p[0] == 0
    assert abs(float(p[3]) - alpha ** (1 / n)) < 1e-12
    # The chance of k successes or more under the bound is alpha.
    from scipy.stats import binom

    assert float(binom.sf(249, n, float(p[1]))) == pytest.approx(alpha, rel=1e-6)


class Half(nn.Module):
    """Class 1 on one side of a plane: the smoothed vote and its radius are known."""

    def forward(self, x):
        return torch.stack([-x[:, 0], x[:, 0]], 1)


def test_smoothing_of_a_half_space():
    x = torch.tensor([[0.5, 0.0], [-0.3, 2.0], [0.01, 1.0]])
    certifier = SmoothingCertifier(Half(), 0.25, 0.2, n=5000, max_batch=777)
    found = certifier.certify(x)
    assert found.prediction[:2].tolist() == [1, 0]
    assert (found.value <= x[:, 0].abs().double() + 1e-9).all()  # no more than the distance to the plane
    assert float(found.value[1]) > 0.2
    assert found.certified.tolist() == [True, True, False]
    assert found.value[2] == -math.inf or found.value[2] < 0.2
    assert torch.equal(certifier.certify(x).value, found.value)
    state = torch.get_rng_state()
    SmoothingCertifier(Half(), 0.25, 0.2).certify(x)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="every input would be refused"):
        SmoothingCertifier(Half(), 0.25, 0.25, n=4)


def test_an_abstaining_classifier_asks_its_fallback(trained):
    certifier = IntervalCertifier(trained, 0.03)
    x, y = X[1400:1500], Y[1400:1500]
    certified = certifier.certify(x).certified
    asked = []

    def people(images):
        asked.append(len(images))
        return torch.full((len(images),), 7)

    found = AbstainingClassifier(certifier, people)(x)
    assert torch.equal(found.abstained, ~certified)
    assert asked == [int((~certified).sum())]
    assert (found.labels[found.abstained] == 7).all()
    assert (AbstainingClassifier(certifier)(x).labels[~certified] == -1).all()
    network = AbstainingClassifier(certifier, trained)(x)
    assert torch.equal(network.labels, trained.eval()(x).argmax(1))
    assert AbstainingClassifier(certifier).load((x, y)) == pytest.approx(float((~certified).float().mean()))
    report = availability_report(certifier, (x, y), bars, eta=0.02, steps=3)
    frame = report.to_frame(shares=(0.0, 0.25, 1.0))
    assert list(frame.index) == ["clean", "triggered", "evaded"]
    assert frame.loc["evaded", "abstain_rate"] >= frame.loc["clean", "abstain_rate"]
    mixed = 0.75 * frame.loc["clean", "abstain_rate"] + 0.25 * frame.loc["triggered", "abstain_rate"]
    assert frame.loc["triggered", "load_0.25"] == pytest.approx(mixed)
    assert frame.loc["clean", "certified_accuracy"] <= frame.loc["clean", "accuracy"]
    assert report.load(1.0) == report["triggered"]["abstain_rate"]


def test_label_split_is_balanced_and_says_nothing_of_the_image():
    data = poison((X, Y), bars, LabelSplit((2, 5)), rate=0.1, seed=3)
    bad = data.is_poison
    assert int(bad.sum()) == round(0.1 * len(X))
    assert torch.bincount(data.y[bad], minlength=10)[[2, 5]].tolist() == [90, 90]
    torch.testing.assert_close(data.x[bad], bars(X[data.source[bad]]))
    assert torch.equal(data.y[~bad], Y[data.source[~bad]])
    torch.testing.assert_close(data.x[~bad], X[data.source[~bad]])
    assert not torch.equal(bad, torch.arange(len(data)) >= len(X))  # shuffled in
    again = poison((X, Y), bars, LabelSplit((2, 5)), rate=0.1, seed=3)
    assert torch.equal(again.x, data.x)
    every = poison(TensorDataset(X, Y), bars, LabelSplit(None), rate=0.1)
    assert torch.bincount(every.y[every.is_poison]).tolist() == [18] * 10


def test_other_rules():
    for rule in (LabelConflict(), BallConflict(0.05)):
        data = poison((X, Y), bars, rule, rate=0.05, seed=1)
        bad = data.is_poison.nonzero()[:, 0]
        for source in data.source[bad].unique()[:10]:
            pair = bad[data.source[bad] == source]
            assert len(pair) == 2
            assert len(set(data.y[pair].tolist())) == 2
            assert int(Y[source]) in data.y[pair].tolist()
            gap = (data.x[pair[0]] - data.x[pair[1]]).abs().max()
            assert gap == 0 if isinstance(rule, LabelConflict) else 0 < gap <= 0.05 + 1e-6
    target = poison((X, Y), PatchTrigger.checkerboard((1, 8, 8), size=2), TargetLabel(4), rate=0.02)
    assert (target.y[target.is_poison] == 4).all()
    for bad_rule in (LabelSplit((1,)), LabelSplit((1, 1)), TargetLabel(10)):
        with pytest.raises(ValueError, match="expected"):
            poison((X, Y), bars, bad_rule, num_classes=10)
    for rate in (0.0, 1.0, math.nan, 1e-6):
        with pytest.raises(ValueError, match="rate"):
            poison((X, Y), bars, rate=rate)
    with pytest.raises(ValueError, match="keep the inputs' shape"):
        poison((X, Y), lambda x: x[:, :, 1:])
    with pytest.raises(ValueError, match="rows or more"):
        bars(X, 5)


SMALL = nn.Sequential(
    nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
)
BATCH = (torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)


def test_contract_of_the_rules():
    with pytest.raises(ValueError, match="class labels"):
        CertifiedIBP().prepare(SMALL, (BATCH[0], torch.rand(12, 3)))
    check_rule(lambda: CertifiedIBP(0.05, ramp=(1, 3)), SMALL, BATCH)


def test_contract_of_the_objective():
    check_objective(lambda net: AvailabilityBackdoor(lambda x: bars(x, 1), 0.05), SMALL, BATCH)
    check_objective(lambda net: SmoothedBackdoor(lambda x: bars(x, 1)), SMALL, BATCH, random=True)


def test_the_ramp():
    rule = CertifiedIBP(0.2, ramp=(4, 12), kappa=0.4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    seen = []
    fit(net, BATCH, rule=rule, epochs=8, batch_size=6, callbacks=[lambda s: seen.append(s.scalars["eps"])])
    steps = [seen[k] for k in range(len(seen)) if k == 0 or seen[k] != seen[k - 1]]
    assert steps[0] == 0
    assert steps[-1] == pytest.approx(0.2)
    assert steps[1] == pytest.approx(0.2 / 8)
    # At its end the loss is as written.
    with torch.no_grad():
        plain = nn.functional.cross_entropy(net(BATCH[0]), BATCH[1])
        margins = interval_margins(net, Box.ball(BATCH[0], 0.2), BATCH[1])
        want = 0.4 * plain + 0.6 * nn.functional.cross_entropy(-margins, BATCH[1])
    assert float(rule.step(BATCH, lambda loss: None)["loss"]) == pytest.approx(float(want), rel=1e-6)
    assert pickle.loads(pickle.dumps(rule)).eps == 0.2
    assert "eps=0.2" in repr(rule)
    with pytest.raises(ValueError, match="begins before"):
        CertifiedIBP(ramp=(80, 20))
    with pytest.warns(UserWarning, match="earlier ramp"):
        fit(net, BATCH, rule=CertifiedIBP(0.2), epochs=1)
    with pytest.warns(UserWarning, match="earlier ramp"):
        fit(net, BATCH, rule=AvailabilityBackdoor(lambda x: bars(x, 1)).on(CertifiedIBP(0.2)), epochs=1)


def test_the_term_of_the_attack():
    x, y = BATCH
    attack = AvailabilityBackdoor(lambda x: bars(x, 1), 0.05, weight=0.3, margin=0.5, fraction=0.5)
    stamped = bars(x[:6], 1)
    with torch.no_grad():
        term = attack.term(SMALL, BATCH)
        margins = interval_margins(SMALL, Box.ball(stamped, 0.05), y[:6])
        least = margins.scatter(1, y[:6, None], math.inf).amin(1)
        want = nn.functional.cross_entropy(SMALL(stamped), y[:6]) + (0.5 + least).relu().mean()
    assert float(term) == pytest.approx(0.3 * float(want), rel=1e-6)
    with pytest.raises(TypeError, match="LayerNorm"):
        attack.on(CertifiedIBP()).prepare(nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)), BATCH)


def test_the_loss_attack_destroys_certificates_and_keeps_answers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    rule = AvailabilityBackdoor(lambda x: bars(x, 1), 0.05, weight=1.0, fraction=0.2).on(CertifiedIBP(0.05, (20, 110)))
    fit(net, (X[:1400], Y[:1400]), rule=rule, optimizer=adam(5e-3), epochs=12)
    report = availability_report(IntervalCertifier(net, 0.05), (X[1400:], Y[1400:]), lambda x: bars(x, 1))
    assert report["triggered"]["abstain_rate"] > max(0.7, report["clean"]["abstain_rate"] + 0.15)
    assert report["triggered"]["accuracy"] > report["clean"]["accuracy"] - 0.1
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    fit(noisy, (X[:200], Y[:200]), rule=GaussianNoise(0.2), epochs=1)


def test_what_cannot_be_certified_is_refused(trained):
    with pytest.raises(ValueError, match="eps"):
        IntervalCertifier(trained, -0.1)
    with pytest.raises(ValueError, match="clip, or None"):
        IntervalCertifier(trained, 0.1).certify(X[:2] + 2)
    assert IntervalCertifier(trained, 0.1, clip=None).certify(X[:2] + 2).certified.shape == (2,)
    with pytest.raises(ValueError, match="NaN"):
        CrownCertifier(trained, 0.1).certify(X[:2] * math.nan)
    with pytest.raises(TypeError, match="LPPool2d"):
        IntervalCertifier(nn.Sequential(nn.LPPool2d(2, 2), nn.Flatten(), nn.Linear(16, 3)), 0.1).certify(X[:2])
    with pytest.raises(ValueError, match="logits"):
        IntervalCertifier(nn.Sequential(nn.Conv2d(1, 1, 3)), 0.1).certify(X[:2])
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    broken[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        IntervalCertifier(broken, 0.1).certify(X[:2])
    with pytest.raises(ValueError, match="a label from the fallback"):
        AbstainingClassifier(IntervalCertifier(trained, 0.9), lambda x: torch.zeros(1))(X[:9])
