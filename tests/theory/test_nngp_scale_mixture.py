import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.datasets import load_digits, load_iris
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.distributions import Gamma, InverseGamma

from torchfolio.theory.infinite_kernels import nngp
from torchfolio.theory.nngp_scale_mixture import (
    Burr12,
    ConvNNGPKernel,
    NNGPKernel,
    ScaleMixtureRegressor,
    SparseStudentTClassifier,
    StudentTProcessRegressor,
    kl_inverse_gamma,
    sample_prior,
    scale_mixture_init_,
)

KERNEL = NNGPKernel(2)
PLAIN = {"kernel": KERNEL, "noise": 0.3, "normalize_y": False}


def table(n=12, seed=0):
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(n, 3))
    return X, np.sin(X[:, 0]) + 0.3 * generator.normal(size=n)


def inverse_gamma(a=2.0, b=3.0):
    return InverseGamma(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


def gram(X, noise=0.3):
    return KERNEL(torch.from_numpy(X)).detach().numpy() + noise * np.eye(len(X))


# Regression


def test_evidence_and_predictive_equal_the_joint_t():
    X, y = table()
    a, b = 2.5, 1.5
    model = StudentTProcessRegressor(**PLAIN, a=a, b=b, optimize=False).fit(X[:9], y[:9])
    C = gram(X)
    joint = stats.multivariate_t(np.zeros(9), b / a * C[:9, :9], df=2 * a)
    assert model.log_marginal_likelihood_ == pytest.approx(joint.logpdf(y[:9]), abs=1e-8)
    # The conditional density is the ratio of joint ones.
    predictive = model.predict(X[9:], return_dist=True)
    for k in range(3):
        rows = [*range(9), 9 + k]
        both = stats.multivariate_t(np.zeros(10), b / a * C[np.ix_(rows, rows)], df=2 * a)
        expected = both.logpdf(y[rows]) - joint.logpdf(y[:9])
        assert float(predictive.log_prob(torch.from_numpy(y[9:]))[k]) == pytest.approx(expected, abs=1e-8)
    shape, scale = model.scale_posterior_
    assert scale / (shape - 1) == pytest.approx((b + y[:9] @ np.linalg.solve(C[:9, :9], y[:9]) / 2) / (a + 4.5 - 1))


def test_fixed_variance_is_the_gaussian_process():
    X, y = table()
    C = gram(X)
    for prior in ("fixed", "evidence"):
        model = StudentTProcessRegressor(**PLAIN, b=3.0, prior=prior, optimize=False).fit(X[:9], y[:9])
        variance = 1.5 if prior == "fixed" else y[:9] @ np.linalg.solve(C[:9, :9], y[:9]) / 9
        joint = stats.multivariate_normal(np.zeros(9), variance * C[:9, :9])
        assert model.log_marginal_likelihood_ == pytest.approx(joint.logpdf(y[:9]), abs=1e-8)
        mean, std = model.predict(X[9:], return_std=True)
        solved = np.linalg.solve(C[:9, :9], C[:9, 9:])
        assert np.allclose(mean, solved.T @ y[:9])
        assert np.allclose(std**2, variance * np.diag(C[9:, 9:] - C[9:, :9] @ solved))
    nearly = StudentTProcessRegressor(**PLAIN, a=1e4, b=1.5e4, optimize=False).fit(X[:9], y[:9])
    fixed = StudentTProcessRegressor(**PLAIN, b=3.0, prior="fixed", optimize=False).fit(X[:9], y[:9])
    y_test = torch.from_numpy(y[9:])
    difference = nearly.predict(X[9:], return_dist=True).log_prob(y_test) - fixed.predict(
        X[9:], return_dist=True
    ).log_prob(y_test)
    assert difference.abs().max() < 1e-3


def test_quadrature_equals_the_closed_form_and_importance_sampling_comes_near():
    X, y = table(8)
    exact = StudentTProcessRegressor(**PLAIN, a=2.0, b=3.0, optimize=False).fit(X[:5], y[:5])
    quadrature = ScaleMixtureRegressor(**PLAIN, prior=inverse_gamma()).fit(X[:5], y[:5])
    assert quadrature.log_marginal_likelihood_ == pytest.approx(exact.log_marginal_likelihood_, abs=1e-8)
    t, mixture = exact.predict(X[5:], return_dist=True), quadrature.predict(X[5:], return_dist=True)
    for value in (-30.0, 0.1, 2.0):
        value = torch.full((3,), value, dtype=torch.float64)
        assert torch.allclose(mixture.log_prob(value), t.log_prob(value), atol=1e-6)
    assert torch.allclose(mixture.stddev, t.stddev, rtol=1e-6)
    for p in (0.001, 0.5, 0.9):
        assert torch.allclose(mixture.quantile(p), t.quantile(p), rtol=1e-6, atol=1e-9)
    for proposal in (None, inverse_gamma(3.0, 4.0)):
        sampled = ScaleMixtureRegressor(
            **PLAIN, prior=inverse_gamma(), inference="importance", nodes=100_000, proposal=proposal, random_state=0
        ).fit(X[:5], y[:5])
        assert sampled.effective_sample_size_ > 10_000
        assert torch.allclose(sampled.predict(X[5:], return_dist=True).stddev, t.stddev, rtol=0.02)
        assert sampled.log_marginal_likelihood_ == pytest.approx(exact.log_marginal_likelihood_, abs=0.02)
    with pytest.warns(UserWarning, match="samples carry the weight"):
        ScaleMixtureRegressor(**PLAIN, inference="importance", nodes=20, random_state=0).fit(*table(200))


@pytest.mark.parametrize("prior", [Burr12(2.0, 1.5), Gamma(torch.tensor(1.5), torch.tensor(2.0)), Burr12(0.5, 0.7)])
def test_any_prior_by_quadrature(prior):
    X, y = table(6)
    model = ScaleMixtureRegressor(**PLAIN, prior=prior).fit(X, y)
    C = gram(X)

    def joint(u):
        log_prior = float(prior.log_prob(torch.tensor(math.exp(u), dtype=torch.float64)))
        return math.exp(log_prior + u + stats.multivariate_normal(np.zeros(6), math.exp(u) * C).logpdf(y))

    value, _ = integrate.quad(joint, -15, 15, epsabs=1e-13, epsrel=1e-8, limit=200)
    assert model.log_marginal_likelihood_ == pytest.approx(math.log(value), abs=1e-6)


def test_burr_distribution():
    prior, scipy = Burr12(2.0, 1.5), stats.burr12(2.0, 1.5)
    x = torch.tensor([0.01, 0.7, 30.0], dtype=torch.float64)
    assert np.allclose(prior.log_prob(x), scipy.logpdf(x))
    torch.manual_seed(0)
    assert stats.kstest(prior.sample((5000,)).numpy(), scipy.cdf).pvalue > 0.01
    with pytest.raises(ValueError, match="c to be positive"):
        Burr12(0.0, 1.0)


def test_optimisation_raises_the_evidence_and_units_do_not_matter():
    X, y = table(30)
    start = StudentTProcessRegressor(NNGPKernel(2), optimize=False).fit(X, y)
    model = StudentTProcessRegressor(NNGPKernel(2), steps=60, lr=0.05).fit(X, y)
    assert model.log_marginal_likelihood_ > start.log_marginal_likelihood_ + 1
    assert model.a_ != 2
    assert "weight_var=2" in repr(model.kernel)
    scaled = StudentTProcessRegressor(NNGPKernel(2), optimize=False).fit(X, 100 * y + 7)
    assert np.allclose(scaled.predict(X), 100 * start.predict(X) + 7)
    assert scaled.log_marginal_likelihood_ == pytest.approx(start.log_marginal_likelihood_ - 30 * math.log(100))
    gaussian = StudentTProcessRegressor(NNGPKernel(2), prior="fixed", steps=60, lr=0.05).fit(X, y)
    assert gaussian.df_ == math.inf
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict(X), model.predict(X))


@parametrize_with_checks([StudentTProcessRegressor(steps=3), ScaleMixtureRegressor()])
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StudentTProcessRegressor(a=0.0), "a to be positive"),
        (lambda: StudentTProcessRegressor(b=math.nan), "b to be a positive"),
        (lambda: StudentTProcessRegressor(noise=-1.0), "noise to be positive"),
        (lambda: StudentTProcessRegressor(prior="t"), "prior to be"),
        (lambda: ScaleMixtureRegressor(inference="mcmc"), "inference to be"),
        (lambda: ScaleMixtureRegressor(nodes=3), "nodes"),
        (lambda: ScaleMixtureRegressor(prior=3.0), "prior to be a torch distribution"),
        (lambda: SparseStudentTClassifier(n_inducing=0), "n_inducing"),
        (lambda: SparseStudentTClassifier(prior=(0.0, 1.0)), "prior's a to be positive"),
        (lambda: NNGPKernel(0), "depth"),
        (lambda: NNGPKernel(weight_var=-1.0), "weight_var to be positive"),
        (lambda: NNGPKernel.of(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "Linear, activation"),
    ],
)
def test_bad_settings_are_refused(make, message):
    X, y = table()
    with pytest.raises((ValueError, TypeError), match=message):
        make().fit(X, y > 0)


def test_missing_variance_is_said():
    X, y = table(1)
    model = StudentTProcessRegressor(**PLAIN, a=0.4, optimize=False).fit(X, y)
    with pytest.warns(UserWarning, match="no variance"):
        assert np.isnan(model.predict(X, return_std=True)[1]).all()
    assert torch.isfinite(model.predict(X, return_dist=True).quantile(0.9)).all()


# Kernels


def test_kernel_modules():
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kernel in (
        NNGPKernel(3, "erf", weight_var=1.3, bias_var=0.2),
        ConvNNGPKernel((3, 2, 2), 2),
        NNGPKernel(2, "gelu"),
    ):
        assert torch.allclose(kernel(x).diagonal(), kernel.diagonal(x), atol=1e-12)
        assert torch.allclose(kernel(x[:2], x), kernel(x)[:2], atol=1e-7)
        again = copy.deepcopy(kernel)
        again.load_state_dict(pickle.loads(pickle.dumps(kernel)).state_dict())
        assert torch.equal(again(x), kernel(x))
        kernel(x).sum().backward()
        assert all(torch.isfinite(p.grad) for p in kernel.parameters())
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    kernel = NNGPKernel.of(network)
    weight, bias = (v.item() for v in kernel.variances)
    assert kernel.depth == 2
    assert weight == pytest.approx(1 / 3, rel=0.1)
    assert torch.allclose(kernel(x), nngp(x, None, "tanh", 2, weight_var=weight, bias_var=bias))


# Classification


def test_divergence_of_inverse_gammas():
    a, b = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.tensor([2.0, 1.2], dtype=torch.float64)
    values = kl_inverse_gamma(a, b, 2.0, 2.0)
    assert float(values[0]) == pytest.approx(0, abs=1e-12)
    q, p = stats.invgamma(3.0, scale=1.2), stats.invgamma(2.0, scale=2.0)
    numeric, _ = integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), 1e-3, np.inf)
    assert float(values[1]) == pytest.approx(numeric, abs=1e-6)


@pytest.mark.parametrize("prior", [(2.0, 2.0), "fixed"])
def test_classifier(prior):
    X, y = load_iris(return_X_y=True)
    X, names = (X - X.mean(0)) / X.std(0), np.array(["a", "b", "c"])[y]
    state = torch.get_rng_state()
    make = {"n_inducing": 15, "prior": prior, "epochs": 40, "batch_size": 40, "lr": 0.05, "random_state": 0}
    model = SparseStudentTClassifier(NNGPKernel(1), **make).fit(X, names)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.score(X, names) > 0.8
    assert model.elbo_[-1] > model.elbo_[0] + 0.3
    probabilities = model.predict_proba(X)
    assert np.allclose(probabilities.sum(1), 1)
    assert np.array_equal(probabilities, model.predict_proba(X))
    assert np.array_equal(SparseStudentTClassifier(NNGPKernel(1), **make).fit(X, names).predict_proba(X), probabilities)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), probabilities)


def test_one_scale_for_all_points_and_classes():
    X, y = load_digits(return_X_y=True)
    model = SparseStudentTClassifier(NNGPKernel(1), n_inducing=20, epochs=1, random_state=0).fit(X[:100] / 16, y[:100])
    process = model.process_
    mean, variance = process.marginals(torch.from_numpy(X[:5] / 16))
    scales = process.scales(20_000)
    assert scales.shape == (20_000, 1, 1)
    torch.manual_seed(0)
    draws = (process.values(mean, variance, scales) - mean) / variance.sqrt()
    # Squares of different classes and points correlate through the scale that they share.
    squares = draws[:, [0, 3], [1, 7]].square().log()
    assert np.corrcoef(squares.T.numpy())[0, 1] > 0.1
    # The divergence of the start: whitened standard normals and the prior's own scale.
    start = type(process)(NNGPKernel(1), torch.randn(4, 3, dtype=torch.float64), 2, (2.0, 2.0))
    assert start.divergence().item() == pytest.approx(0, abs=1e-12)


# Finite networks


def test_heavy_tailed_initialisation_is_student_t():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)

    def network():
        hidden, last = nn.Linear(4, 512, dtype=torch.float64), nn.Linear(512, 1, dtype=torch.float64)
        nn.init.normal_(hidden.weight, 0, (2 / 4) ** 0.5, generator=generator)
        nn.init.zeros_(hidden.bias)
        scale_mixture_init_(last, inverse_gamma(2.0, 3.0), generator)
        return nn.Sequential(hidden, nn.ReLU(), last)

    outputs = sample_prior(network, x, 600)[..., 0].numpy()
    scale = (1.5 * nngp(x, None, "relu", 1, weight_var=2.0).diagonal()).sqrt().numpy()
    for k in range(3):
        assert stats.kstest(outputs[:, k] / scale[k], stats.t(4).cdf).pvalue > 0.01
    last = nn.Linear(3, 2)
    variances = [scale_mixture_init_(last, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert variances[0] == variances[1] != variances[2]
    assert not last.bias.any()
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        scale_mixture_init_(nn.Conv2d(1, 1, 1))


def test_priors_and_kernels_at_the_door():
    X, y = table()
    uniform = ScaleMixtureRegressor(**PLAIN, prior=torch.distributions.Uniform(0.5, 2.0), nodes=2000).fit(X, y)
    C = gram(X)
    evidence = lambda v: stats.multivariate_normal(np.zeros(12), v * C).pdf(y) / 1.5  # noqa: E731
    expected, _ = integrate.quad(evidence, 0.5, 2.0)
    assert uniform.log_marginal_likelihood_ == pytest.approx(math.log(expected), abs=2e-3)
    assert 0.5 <= uniform.variances_.min() <= uniform.variances_.max() <= 2
    for prior, match in (
        (torch.distributions.Normal(0.0, 1.0), "positive numbers"),
        (Gamma(torch.ones(2), torch.ones(2)), "one number"),
    ):
        with pytest.raises(ValueError, match=match):
            ScaleMixtureRegressor(prior=prior).fit(X, y)
    with pytest.raises(TypeError, match="distribution"):
        scale_mixture_init_(nn.Linear(2, 2), prior=3)
    for model in (StudentTProcessRegressor("relu"), ScaleMixtureRegressor(nn.Linear(3, 3))):
        with pytest.raises(TypeError, match="kernel"):
            model.fit(X, y)
    for prior in ((1.0,), "wide"):
        with pytest.raises(ValueError, match="pair"):
            SparseStudentTClassifier(prior=prior).fit(X, y > 0)
