"""The naive Bayes probe against its definitions, scikit-learn's own checks, and the bound of its paper."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import BernoulliNB, GaussianNB
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from tests.contracts.adaptation import check_adapter
from torchfolio.adaptation import learning_curves
from torchfolio.adaptation.naive_bayes_probe import (
    BernoulliProbe,
    LearningCurve,
    NaiveBayesHead,
    NaiveBayesProbe,
    consistency_bound,
    crossover,
    gaussian_fit,
    gaussian_mixture,
    learning_curve,
    least_log_regret,
    probe,
    samples_to_reach,
)
from torchfolio.models import MLP, ConvNet

DIGITS, LABELS = load_digits(return_X_y=True)
IRIS, SPECIES = load_iris(return_X_y=True)


@parametrize_with_checks([NaiveBayesProbe(), NaiveBayesProbe(variance="class"), NaiveBayesProbe(scale=None)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("prior", ["empirical", "uniform", [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("scale", ["minmax", None])
def test_posterior_is_the_gaussian_one(prior, scale):
    head = NaiveBayesProbe(prior=prior, scale=scale, epsilon=1e-3).fit(IRIS, SPECIES)
    count = np.bincount(SPECIES)
    pi = {"empirical": count / 150, "uniform": np.full(3, 1 / 3)}.get(prior if isinstance(prior, str) else "", prior)
    variances = np.stack([IRIS[k == SPECIES].var(0) for k in range(3)])
    spread = np.ptp(IRIS, axis=0) if scale else 1.0
    sigma = np.sqrt((count / 150) @ variances + 1e-3 * spread**2)
    means = np.stack([IRIS[k == SPECIES].mean(0) for k in range(3)])
    log = np.log(pi) + norm.logpdf(IRIS[:, None], means, sigma).sum(-1)
    expected = np.exp(log - np.logaddexp.reduce(log, 1, keepdims=True))
    np.testing.assert_allclose(head.var_, sigma**2, rtol=1e-12)
    np.testing.assert_allclose(head.predict_proba(IRIS), expected, atol=1e-8)
    np.testing.assert_allclose(head.predict_log_proba(IRIS), np.log(expected), atol=1e-8)
    difference = head.decision_function(IRIS) - (IRIS @ head.coef_.T + head.intercept_)
    np.testing.assert_allclose(difference, 0, atol=1e-8)
    joint = log - (IRIS @ head.coef_.T + head.intercept_)
    np.testing.assert_allclose(joint - joint[:, :1], 0, atol=1e-8)


def test_two_classes_are_parted_along_fisher():
    X, y = IRIS[:100], SPECIES[:100]
    head = NaiveBayesProbe(epsilon=0).fit(X, y)
    fisher = (X[50:].mean(0) - X[:50].mean(0)) / head.var_
    np.testing.assert_allclose(head.coef_[1] - head.coef_[0], fisher, rtol=1e-10)
    assert head.decision_function(X).shape == (100,)
    midpoint = (X[50:].mean(0) + X[:50].mean(0)) / 2
    np.testing.assert_allclose(head.predict_proba(midpoint[None]), 0.5, atol=1e-8)


@pytest.mark.parametrize("variance", ["shared", "class"])
@pytest.mark.parametrize("chunks", [[1] * 60, [7, 200, 1, 92], [300]])
def test_chunks_do_not_matter(variance, chunks):
    X, y = DIGITS[: sum(chunks)] + 1e3, LABELS[: sum(chunks)]
    whole, parts = NaiveBayesProbe(variance).fit(X, y), NaiveBayesProbe(variance)
    for rows in np.split(np.arange(len(X)), np.cumsum(chunks)[:-1]):
        parts.partial_fit(X[rows], y[rows], classes=np.arange(10))
    for name in ("class_count_", "theta_", "var_", "class_prior_"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(parts.predict_log_proba(X + 1), whole.predict_log_proba(X + 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [1e-9, 1e-2])
def test_class_variances_are_scikit_learns(smoothing):
    ours = NaiveBayesProbe("class", epsilon=0, var_smoothing=smoothing, scale=None).fit(DIGITS[:500], LABELS[:500])
    theirs = GaussianNB(var_smoothing=smoothing).fit(DIGITS[:500], LABELS[:500])
    np.testing.assert_allclose(ours.var_, theirs.var_, rtol=1e-8)
    np.testing.assert_allclose(ours.predict_proba(DIGITS), theirs.predict_proba(DIGITS), atol=1e-8)
    with pytest.raises(ValueError, match="quadratic"):
        ours.to_linear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors(dtype):
    x, y = torch.from_numpy(DIGITS).to(dtype), torch.from_numpy(LABELS)  # pixels 0 to 16 are exact in each
    head, array = NaiveBayesProbe().fit(x[:300], y[:300]), NaiveBayesProbe().fit(DIGITS[:300], LABELS[:300])
    np.testing.assert_allclose(head.coef_, array.coef_, rtol=1e-10, atol=1e-10)
    assert head.predict_proba(x).dtype == dtype
    assert torch.equal(head.predict(x), torch.from_numpy(array.predict(DIGITS)))
    assert head.score(x, y) == array.score(DIGITS, LABELS)
    named = NaiveBayesProbe().partial_fit(x[:300], LABELS[:300].astype(str), classes=[*"0123456789"])
    assert set(named.predict(x)) <= set("0123456789")


def test_linear_layer_and_copies():
    state = torch.get_rng_state()
    head = NaiveBayesProbe().fit(DIGITS[:300], LABELS[:300])
    layer = head.to_linear(dtype=torch.float64)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        posterior = layer(torch.from_numpy(DIGITS)).softmax(1).numpy()
    np.testing.assert_allclose(posterior, head.predict_proba(DIGITS), atol=1e-10)
    single = head.to_linear()(torch.from_numpy(DIGITS).float()).argmax(1).numpy()
    assert (single == head.predict(DIGITS)).mean() > 0.999
    for other in (pickle.loads(pickle.dumps(head)), copy.deepcopy(head)):
        assert np.array_equal(other.predict_proba(DIGITS), head.predict_proba(DIGITS))
    assert (head.coef_[:, np.ptp(DIGITS[:300], axis=0) == 0] == 0).all()  # constant features have no weight
    fresh = NaiveBayesProbe().fit(DIGITS[300:], LABELS[300:])
    assert np.array_equal(head.fit(DIGITS[300:], LABELS[300:]).coef_, fresh.coef_)  # fit forgets


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variance": "full"}, "variance"),
        ({"scale": "standard"}, "scale"),
        ({"epsilon": -1e-9}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"var_smoothing": -1.0}, "var_smoothing"),
        ({"prior": "flat"}, "prior"),
        ({"prior": [1.2, -0.1, -0.1]}, "at least 0"),
        ({"prior": [0.5, 0.5]}, "3 probabilities"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NaiveBayesProbe(**settings).fit(IRIS, SPECIES)


def test_bad_data():
    x, y = torch.from_numpy(IRIS), torch.from_numpy(SPECIES)
    for X in (IRIS * np.nan, x * np.nan):
        with pytest.raises(ValueError, match="NaN"):
            NaiveBayesProbe().fit(X, SPECIES)
    with pytest.raises(ValueError, match="at least two classes"):
        NaiveBayesProbe().fit(IRIS, SPECIES * 0)
    with pytest.raises(ValueError, match="that vary within"):
        NaiveBayesProbe(epsilon=0).fit(np.c_[IRIS, SPECIES], SPECIES)
    with pytest.raises(ValueError, match="first call"):
        NaiveBayesProbe().partial_fit(IRIS, SPECIES)
    stream = NaiveBayesProbe(epsilon=0)  # one sample has no variance yet
    for row in range(0, 150, 5):
        stream.partial_fit(IRIS[row : row + 1], SPECIES[row : row + 1], classes=[0, 1, 2])
    assert stream.score(IRIS, SPECIES) > 0.9
    head = NaiveBayesProbe().partial_fit(IRIS[:60], SPECIES[:60], classes=[0, 1, 2])
    with pytest.raises(ValueError, match=r"class .*2.* has none"):
        head.predict(IRIS)
    with pytest.raises(ValueError, match="labels among"):
        head.partial_fit(IRIS, SPECIES + 1)
    with pytest.raises(ValueError, match="3 features"):
        head.partial_fit(x[:, :3], y)
    with pytest.raises(ValueError, match="as many labels"):
        NaiveBayesProbe().fit(x, y[:3])
    for X in (x[0], x[:0]):
        with pytest.raises(ValueError, match="one sample or more"):
            NaiveBayesProbe().fit(X, y[: len(X)])


def test_bound_of_random_predictions():
    rng = np.random.default_rng(0)
    for K in (2, 3, 10):
        p, q = rng.dirichlet(np.full(K, 0.5), 10_000), rng.dirichlet(np.full(K, 0.5), 10_000)
        p, q = (np.maximum(a, 1e-300) for a in (p, q))
        divergence = (p * np.log(p / q)).sum(1)
        t = p.max(1) - p[np.arange(len(p)), q.argmax(1)]
        assert (divergence >= least_log_regret(t) - 1e-12).all()
        assert (t <= consistency_bound(np.maximum(divergence, 0)) + 1e-7).all()
    equal = 0.8 * np.log(1.6) + 0.2 * np.log(0.4)
    assert abs(least_log_regret(0.6) - equal) < 1e-12
    assert abs(consistency_bound(equal) - 0.6) < 1e-12


def test_bound_and_inverse():
    t = np.array([0, 1e-9, 1e-3, 0.0199, 0.0201, 0.5, 0.9, 0.999, 1])
    np.testing.assert_allclose(consistency_bound(least_log_regret(t)), t, rtol=1e-9, atol=1e-15)
    x = np.linspace(0, 3, 200)
    assert (consistency_bound(x) <= consistency_bound(x, exact=False)).all()
    np.testing.assert_allclose(consistency_bound(x, exact=False), np.minimum(np.sqrt(2 * x), 1))
    assert consistency_bound(np.log(2)) == 1 == least_log_regret(1) / np.log(2)
    assert consistency_bound(0.1, log_gap=0.05, zero_one_gap=0.2) == pytest.approx(consistency_bound(0.15) - 0.2)
    assert consistency_bound(torch.tensor([0.1])).dtype == torch.float32
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="log_regret"):
            consistency_bound(bad)
        with pytest.raises(ValueError, match="zero_one_regret"):
            least_log_regret(bad)


class OneByOne(NaiveBayesProbe):
    subset_errors = property()  # hides the batched pass


@pytest.mark.parametrize("settings", [{}, {"scale": None, "var_smoothing": 1e-2}, {"prior": "uniform"}])
def test_batched_curve_is_the_loop(settings):
    X, y = DIGITS + np.random.default_rng(0).normal(size=DIGITS.shape), LABELS.astype(str)
    heads = {"batched": NaiveBayesProbe(**settings), "loop": OneByOne(**settings)}
    curves = learning_curve(X[:600], y[:600], X[600:], y[600:], [300, 12, 20, 60], [2, 5, 5, 5], heads)
    np.testing.assert_allclose(curves["batched"].errors, curves["loop"].errors, atol=1e-12)
    assert curves["loop"].sizes.tolist() == [12, 20, 60, 300]
    assert np.isnan(curves["loop"].errors[3, 2:]).all()
    assert curves["loop"].to_frame()["subsets"].tolist() == [5, 5, 5, 2]
    assert not hasattr(heads["loop"], "classes_")


def test_subsets_hold_every_class_and_are_drawn_exactly(monkeypatch):
    codes, rng = np.repeat([0, 1, 2], [5, 3, 2]), np.random.default_rng(0)
    drawn = np.bincount([learning_curves._counts(rng, [5, 3, 2], 5)[0] for _ in range(600)], minlength=4)[1:] / 600
    ways = np.array([5 * (3 * 1 + 1 * 2), 10 * (3 * 2 + 3 * 1), 10 * 3 * 2])  # with 1, 2, 3 of the first class
    np.testing.assert_allclose(drawn, ways / ways.sum(), atol=0.07)
    monkeypatch.setattr(learning_curves, "_DRAWS", 0)
    for _ in range(20):
        rows = learning_curves._subset(rng, codes, 3, 4)
        assert len(set(rows)) == 4
        assert set(codes[rows]) == {0, 1, 2}


def test_reading_curves():
    sizes = np.array([10, 100, 1000])
    a, b = LearningCurve(sizes, np.array([[0.3], [0.2], [0.2]])), LearningCurve(sizes, np.array([[0.4], [0.3], [0.1]]))
    assert crossover(a, b) == pytest.approx(10**2.5) == crossover(b, a)
    assert crossover(a, a) is None
    assert samples_to_reach(b, 0.3) == 1000
    assert samples_to_reach(a, 0.1) is None
    with pytest.raises(ValueError, match="same sizes"):
        crossover(a, LearningCurve(sizes + 1, a.errors))
    for size in (9, 2000):
        with pytest.raises(ValueError, match="from 10 to 1797"):
            learning_curve(DIGITS, LABELS, DIGITS, LABELS, [size], 1, {"nb": NaiveBayesProbe()})


@pytest.mark.parametrize(("n", "K", "cov"), [(6, 2, "easy"), (7, 4, "easy"), (6, 3, "hard")])
def test_mixture(n, K, cov):
    X, y = gaussian_mixture(n, K, 200_000, cov, seed=1)
    unit = 2.0 ** (K - 3) if K > 2 else 1.0
    centres = (np.array([-1.0, 1, 2, 4][:K]) - (unit if K > 2 else 0)) / unit
    within = X - centres[y][:, None]
    np.testing.assert_allclose(within.mean(0), 0, atol=0.05)
    deviation = np.where(np.arange(n) < n // 2, np.sqrt(n), 1) / unit
    np.testing.assert_allclose(within.std(0), deviation, rtol=0.02)
    correlation = np.abs(np.corrcoef(within.T) - np.eye(n)).max()
    assert correlation > 0.1 if cov == "hard" else correlation < 0.02


def test_fewer_samples_in_high_dimension():
    X, y = gaussian_mixture(200, 2, 2000, seed=0)
    heads = {"nb": NaiveBayesProbe(scale=None), "lr": LogisticRegression(max_iter=200)}
    curves = learning_curve(X[:1000], y[:1000], X[1000:], y[1000:], [10, 30], 3, heads)
    assert samples_to_reach(curves["nb"], 0.02) == 10
    assert samples_to_reach(curves["lr"], 0.02) is None


def test_diagnostics_tell_gaussian_features():
    X, y = gaussian_mixture(4, 2, 20_000, seed=0)
    X[:, 3] = np.exp(X[:, 3])
    fit = gaussian_fit(X, y)
    assert (fit.divergence[:3] < 0.005).all()
    assert fit.divergence[3] > 0.1
    assert (np.diff(fit.variance_quantiles) >= 0).all()
    assert fit.difference_mean > 0 < fit.difference_variance


@pytest.mark.parametrize("head", ["nb", "lr", LogisticRegression(max_iter=500)])
def test_probing_leaves_the_network_alone(head):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    before = copy.deepcopy(net.state_dict())
    x, y = torch.from_numpy(DIGITS[:301]).float().view(-1, 1, 8, 8), torch.from_numpy(LABELS[:301])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = probe(net, "2", (x, y), head, pool=False, batch_size=100)
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    features = net.eval()[:3](x).flatten(1).detach()
    assert fitted.score(features.double().numpy(), y.numpy()) > 0.85
    with pytest.raises(ValueError, match="no module"):
        probe(net, "layer9", (x, y))


@pytest.mark.parametrize("num_classes", [0, 10, 5])
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_head_of_a_network(kind, num_classes, tmp_path):
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 1, "widths": (8, 16)}
    arguments = (
        arguments if kind == "conv" else {"in_features": 64, "out_features": 10, "hidden": (24,), "dropout": 0.2}
    )
    model = ConvNet(**arguments) if kind == "conv" else MLP(**arguments)
    x, y = torch.from_numpy(DIGITS[:301]).float().view(-1, 1, 8, 8), torch.from_numpy(LABELS[:301])
    x, y = (x[y < num_classes], y[y < num_classes]) if num_classes else (x, y)
    network = {"build": f"torchfolio.models:{type(model).__name__}", "arguments": arguments}
    make = lambda: NaiveBayesHead(var_smoothing=1e-2, batch_size=100)  # noqa: E731
    done = check_adapter(make, model, (x, y), network, tmp_path, x[:20], num_classes=num_classes)
    assert done.report["samples"] == len(x)
    with torch.no_grad():
        logits = done.model(x)
    assert logits.shape == (len(x), num_classes or 10)
    assert (logits.argmax(1) == y).float().mean() > 0.6
    end = list(model.head.children())[:2] if kind == "conv" else []
    body = nn.Sequential(*list(model.children())[:-1], *end)
    with torch.no_grad():
        features = body.eval()(x)
    expected = NaiveBayesProbe(var_smoothing=1e-2).fit(features, y).predict_proba(features)
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-3, rtol=1e-3)


def test_head_needs_a_linear_end_and_every_class():
    x, y = torch.randn(40, 6), torch.arange(40) % 4
    for net in (nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Linear(6, 4, bias=False)):
        with pytest.raises(ValueError, match=r"nn\.Linear with a bias"):
            NaiveBayesHead().adapt(net, (x, y), device="cpu")
    with pytest.raises(ValueError, match=r"class .*4.* has none"):
        NaiveBayesHead().adapt(nn.Linear(6, 5), (x, y), device="cpu")
    with pytest.raises(ValueError, match="labels among"):
        NaiveBayesHead().adapt(nn.Linear(6, 3), (x, y), device="cpu")
    adapter = NaiveBayesHead()
    assert adapter.adapt(nn.Linear(6, 7), (x, y), num_classes=4, device="cpu").model.out_features == 4
    with pytest.raises(ValueError, match="num_classes or out_features"):
        adapter.recipe({"build": "a:b", "arguments": {}})


# Binary features


@parametrize_with_checks([BernoulliProbe()])
def test_bernoulli_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("prior", ["empirical", "uniform"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_bernoulli_is_scikit_learns_and_linear(alpha, prior):
    X = (DIGITS > 7).astype(float)
    ours = BernoulliProbe(alpha=alpha, prior=prior, binarize=None).fit(X[:300], LABELS[:300])
    theirs = BernoulliNB(alpha=alpha, fit_prior=prior == "empirical").fit(X[:300], LABELS[:300])
    np.testing.assert_allclose(ours.predict_log_proba(X), theirs.predict_log_proba(X), atol=1e-8)
    np.testing.assert_allclose(ours.decision_function(X), X @ ours.coef_.T + ours.intercept_, atol=1e-10)
    chunks = BernoulliProbe(alpha=alpha, prior=prior, binarize=None)
    for start in range(0, 300, 70):
        part = slice(start, min(start + 70, 300))
        chunks.partial_fit(X[part], LABELS[part], classes=range(10))
    np.testing.assert_allclose(chunks.coef_, ours.coef_, atol=1e-10)
    above = BernoulliProbe(alpha=alpha, prior=prior, binarize=7.0).fit(torch.from_numpy(DIGITS[:300]), LABELS[:300])
    assert torch.equal(above.predict(torch.from_numpy(DIGITS)), torch.from_numpy(ours.predict(X)))
    layer = ours.to_linear(dtype=torch.float64)
    posterior = layer(torch.from_numpy(X)).softmax(1).detach().numpy()
    np.testing.assert_allclose(posterior, ours.predict_proba(X), atol=1e-10)


def test_bernoulli_refuses():
    with pytest.raises(ValueError, match="0 or 1"):
        BernoulliProbe(binarize=None).fit(DIGITS, LABELS)
    for settings in ({"alpha": 0}, {"alpha": float("nan")}, {"prior": [1.0, 0.0]}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BernoulliProbe(**settings).fit(DIGITS, LABELS)
    X = (DIGITS > 7).astype(float)
    curve = learning_curve(X[:400], LABELS[:400], X[400:], LABELS[400:], [40], 3, {"b": BernoulliProbe()})["b"]
    assert 0 < float(curve.mean[0]) < 0.6
