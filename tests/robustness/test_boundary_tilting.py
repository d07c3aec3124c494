"""Boundary tilting against its identities, direct solves, samples, and scikit-learn's classifiers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from torch import nn

from torchfolio.adaptation.naive_bayes_probe import NaiveBayesProbe
from torchfolio.data.examples import Examples
from torchfolio.robustness.boundary_tilting import (
    BoundaryAngles,
    RidgePath,
    adversarial_strength,
    analyse,
    deviation_angle,
    gaussian_error,
    mirror,
    nearest_centroid,
    pareto,
    plot_mirrors,
    plot_path,
    project,
    regularisation_path,
    taxonomy,
    tilt,
    tilt_direction,
    tilt_to_data,
)

DIGITS, LABELS = load_digits(return_X_y=True)
PAIR = (LABELS == 3) | (LABELS == 7)
X37, Y37 = DIGITS[PAIR], LABELS[PAIR]


def random_problem(seed=0, n=80, d=12):
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.integers(2, size=n)
    X[y == 1] += 2 * rng.normal(size=d)
    w = rng.normal(size=d)
    z, _ = nearest_centroid(X, y)
    return X, y, w if w @ z > 0 else -w, rng.normal()


@pytest.mark.parametrize("seed", range(5))
def test_strength_is_one_over_the_cosine(seed):
    X, y, w, b = random_problem(seed)
    delta = np.radians(deviation_angle(w, X, y))
    assert abs(adversarial_strength(w, b, X, y) * np.cos(delta) - 1) < 1e-10
    assert abs(adversarial_strength(7 * w, 7 * b - 3, X, y) * np.cos(delta) - 1) < 1e-10  # whatever length and bias
    assert adversarial_strength(w, b, X, y, signed=False) <= adversarial_strength(w, b, X, y)
    z, c = nearest_centroid(X, y)
    assert deviation_angle(z, X, y) < 1e-6
    assert adversarial_strength(z, c, X, y) == pytest.approx(1, abs=1e-12)


def test_unsigned_strength_is_the_signed_one_without_errors():
    X, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 2
    X[y == 1] += 50
    w, b = nearest_centroid(X, y)
    assert adversarial_strength(w, b, X, y, False) == pytest.approx(adversarial_strength(w, b, X, y), abs=1e-12)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_mirror_and_projection(kind):
    X, _, w, b = random_problem()
    x, weight = kind(X.reshape(-1, 3, 4)), kind(w)
    value = X @ w + b
    image, foot = mirror(x, weight, b), project(x, weight, b)
    assert image.shape == x.shape
    np.testing.assert_allclose(mirror(image, weight, b), x, atol=1e-10)
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 12) @ w + b, -value, atol=1e-10)
    np.testing.assert_allclose(np.asarray(foot).reshape(-1, 12) @ w + b, 0, atol=1e-10)
    half = torch.tensor(X, dtype=torch.bfloat16)
    assert mirror(half, torch.tensor(w), b).dtype == torch.bfloat16


@pytest.mark.parametrize("theta", [0, 30, 60, 89])
def test_tilting_where_there_are_no_data(theta):
    X, y, w, b = random_problem()
    X, w = np.pad(X, ((0, 0), (0, 5))), np.pad(w, (0, 5))  # five directions without data
    t = tilt_direction(w, X, y)
    assert np.abs((X - X.mean(0)) @ t).max() < 1e-6
    tilted, offset = tilt_to_data(w, b, X, y, theta)
    before, after = (np.radians(deviation_angle(v, X, y)) for v in (w, tilted))
    assert abs(np.cos(after) - np.cos(np.radians(theta)) * np.cos(before)) < 1e-10
    value, scale = X @ w + b, np.linalg.norm(w)
    np.testing.assert_allclose(X @ tilted + offset, np.cos(np.radians(theta)) * value / scale, atol=1e-6)
    assert ((X @ tilted + offset > 0) == (value > 0)).all()


def test_directions_of_tilting():
    X, y, w, _ = random_problem(n=400)
    z, _ = nearest_centroid(X, y)
    within = X - np.stack([X[y == k].mean(0) for k in (0, 1)])[y]
    trailing, leading = (tilt_direction(w, X, y, along) for along in ("trailing", "leading"))
    for t in (trailing, leading):
        assert abs(np.linalg.norm(t) - 1) < 1e-10
        assert abs(t @ w) < 1e-10 * np.linalg.norm(w)
    assert abs(trailing @ z) < 1e-10
    variance = [(within @ t).var() for t in (trailing, leading)]
    for _ in range(50):
        u = np.random.default_rng().normal(size=12)
        u -= (u @ w) / (w @ w) * w
        assert (within @ (u / np.linalg.norm(u))).var() <= variance[1] * (1 + 1e-9)
        u = u - np.linalg.lstsq(np.c_[w, z], u, rcond=None)[0] @ np.c_[w, z].T
        assert (within @ (u / np.linalg.norm(u))).var() >= variance[0] * (1 - 1e-9)
    with pytest.raises(ValueError, match="along w"):
        tilt(w, 0.0, 2 * w, 10, X.mean(0))


@pytest.mark.parametrize(("n", "d"), [(80, 12), (10, 30)])
def test_path_is_the_direct_solve(n, d):
    X, y, _, _ = random_problem(1, n, d)
    X = np.c_[X, np.full(n, 3.0)]
    alphas = np.logspace(4, -4, 12)
    path = RidgePath(X, y, alphas)
    z, _ = nearest_centroid(X, y)
    means = np.stack([X[y == k].mean(0) for k in (0, 1)])
    sigma = (X - means[y]).T @ (X - means[y]) / n
    for rho, c, angle, strength, b in zip(
        alphas, path.coef_, path.angles, path.strengths, path.intercept_, strict=True
    ):
        direct = np.linalg.solve(sigma + rho * np.eye(len(z)), z)
        direct /= np.linalg.norm(direct)
        np.testing.assert_allclose(c, direct, atol=1e-9)
        assert abs(np.cos(np.radians(angle)) - direct @ z) < 1e-10
        assert abs(strength * (direct @ z) - 1) < 1e-8
        assert abs(c @ means.mean(0) + b) < 1e-9
        ridge = RidgeClassifier(alpha=n * rho, solver="svd").fit(X, y).coef_.ravel()
        np.testing.assert_allclose(c, ridge / np.linalg.norm(ridge), atol=1e-7)
    assert (np.diff(path.angles) > 0).all()
    frame = path.to_frame(X, y)
    np.testing.assert_allclose(frame["val_error"], [((X @ c + b > 0) != y).mean() for c, b in zip(path.coef_, path.intercept_, strict=True)])  # fmt: skip


@pytest.mark.parametrize("k", [2, 3])
def test_enlarging_images_changes_nothing(k):
    images = X37.reshape(-1, 8, 8)
    large = images.repeat(k, 1).repeat(k, 2)
    small, path = RidgePath(images, Y37, [1.0, 0.01]), RidgePath(large, Y37, k**2 * np.array([1.0, 0.01]))
    np.testing.assert_allclose(path.angles, small.angles, atol=1e-8)
    for p in range(2):
        values = [data.reshape(len(data), -1) @ one.coef_[p] + one.intercept_[p] for data, one in ((images, small), (large, path))]  # fmt: skip
        np.testing.assert_allclose(values[1], k * values[0], atol=1e-8)


def test_error_formula_of_gaussian_classes():
    rng = np.random.default_rng(0)
    A, i, j, w = rng.normal(size=(4, 4)), np.zeros(4), np.array([1.0, 2, 0, -1]), np.array([1.0, 1, 0.5, -1])
    cov, N = A @ A.T, 10**6
    for b in (-w @ (i + j) / 2, 0.3):
        exact = gaussian_error(w, b, i, j, cov)
        x = rng.normal(size=(N, 4)) @ A.T
        sampled = (((x[: N // 2] + i) @ w + b > 0).mean() + ((x[N // 2 :] + j) @ w + b <= 0).mean()) / 2
        assert abs(sampled - exact) < 4 * np.sqrt(exact * (1 - exact) / N)


def test_types():
    angles, errors = [1, 4, 20, 50, 70, 85], [0.05, 0.045, 0.03, 0.0101, 0.01, 0.04]
    assert taxonomy(angles, errors, 10_000).tolist() == [0, 0, 1, 1, 2, 2]
    assert taxonomy(angles, errors, 10_000, tol=0.0).tolist() == [0, 0, 1, 1, 1, 2]
    frame = regularisation_path(lambda C: LinearSVC(C=C, intercept_scaling=10), [1e-6, 1e-3, 1.0], X37[::2], Y37[::2], X37[1::2], Y37[1::2])  # fmt: skip
    assert list(frame.columns) == ["regularisation", "angle", "strength", "train_error", "val_error", "type"]
    assert frame["angle"].is_monotonic_increasing
    front = pareto(frame)
    assert front["val_error"].is_monotonic_decreasing
    assert plot_path(frame).axes
    with pytest.raises(ValueError, match="whole number"):
        taxonomy(angles, errors, 0)


ESTIMATORS = [
    RidgeClassifier(),
    LogisticRegression(max_iter=500),
    LinearSVC(),
    LinearDiscriminantAnalysis(),
    NaiveBayesProbe(var_smoothing=1e-2),
    SVC(kernel="linear"),
    make_pipeline(StandardScaler(), RidgeClassifier()),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("classes", [(3, 7), (7, 3), (0, 9)])
def test_any_linear_estimator_and_pair(estimator, classes):
    keep = np.isin(LABELS, [0, 3, 7, 9])
    X, y = DIGITS[keep], LABELS[keep]
    report = analyse(estimator.fit(X, y), X, y, classes)
    assert report.angle < 90
    assert report.strength == pytest.approx(1 / np.cos(np.radians(report.angle)))
    assert max(report.errors) < 0.1  # the side of each class is right
    assert min(report.distances) > 0
    assert report.strength_unsigned <= report.strength * (1 + 1e-12)
    assert report.to_frame().shape == (1, 14)
    two = np.isin(y, classes)
    again = analyse(copy.deepcopy(estimator).fit(X[two], y[two]), X[two], y[two], classes)
    assert max(again.errors) < 0.05


def test_not_linear_and_bad_input():
    with pytest.raises(TypeError, match="not linear"):
        analyse(SVC().fit(X37, Y37), X37, Y37)
    with pytest.raises(ValueError, match="other than 0"):
        deviation_angle(np.zeros(64), X37, Y37)
    with pytest.raises(ValueError, match="coincide"):
        nearest_centroid(np.r_[X37, X37], np.repeat([0, 1], len(X37)))
    with pytest.raises(ValueError, match="two classes, got 1"):
        nearest_centroid(X37, Y37 * 0)
    with pytest.raises(ValueError, match="two classes, got 10"):
        RidgePath(DIGITS, LABELS, [1.0])
    with pytest.raises(ValueError, match="NaN"):
        nearest_centroid(X37 * np.nan, Y37)
    for alphas in ([0.0], [], [np.nan]):
        with pytest.raises(ValueError, match="alphas"):
            RidgePath(X37, Y37, alphas)
    with pytest.raises(ValueError, match="classes"):
        analyse(RidgeClassifier().fit(DIGITS, LABELS), DIGITS, LABELS)
    w, b = nearest_centroid(X37, Y37)
    with pytest.warns(UserWarning, match="worse than chance"):
        assert deviation_angle(-w, X37, Y37) == pytest.approx(180)
    with pytest.warns(UserWarning, match="worse than chance"):
        assert np.isnan(adversarial_strength(-w, -b, X37, Y37))


def test_network_that_is_linear_is_measured_as_a_linear_classifier():
    torch.manual_seed(0)
    ridge = RidgeClassifier(alpha=1e3).fit(DIGITS, LABELS)
    layer = nn.Linear(64, 10).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(ridge.coef_))
        layer.bias.copy_(torch.from_numpy(ridge.intercept_))
    x, y = torch.from_numpy(DIGITS), torch.from_numpy(LABELS)
    exact = analyse(ridge, DIGITS, LABELS, (3, 7))
    assert analyse(layer, x, y, (3, 7)).strength == pytest.approx(exact.strength)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), layer)
    local = analyse(net, x.view(-1, 1, 8, 8), y, (3, 7), batch_size=100)
    assert net.training
    assert local.reached == 1
    assert local.centroids.shape == local.mirrors.shape == (2, 1, 8, 8)
    np.testing.assert_allclose(local.angles, exact.angle, atol=1e-6)
    for name in ("strength_unsigned", "errors", "distances"):
        assert getattr(local, name) == pytest.approx(getattr(exact, name))
    np.testing.assert_allclose(local.mirrors.reshape(2, -1), exact.mirrors, atol=1e-8)
    features = analyse(net, x.view(-1, 1, 8, 8), y, (3, 7), layer="0")
    np.testing.assert_allclose(features.angles, local.angles, atol=1e-6)
    assert plot_mirrors(local).axes
    assert plot_mirrors(exact, (8, 8)).axes


@pytest.mark.parametrize("layer", [None, "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_is_measured_where_its_boundary_is(layer, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)
    net[3].weight.data *= 5
    before = copy.deepcopy(net.state_dict())
    x, y = torch.randn(50, 1, 4, 4, dtype=dtype), torch.arange(50) % 3
    state = torch.get_rng_state()
    report = analyse(net, x, y, (0, 2), layer=layer, batch_size=7)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not net[2]._forward_hooks
    assert len(report.angles) == int((y != 1).sum())
    whole = analyse(net, x, y, (0, 2), layer=layer)
    np.testing.assert_allclose(whole.strengths, report.strengths, rtol=1e-3)
    assert 0 < report.angle < 180
    assert report.reached > 0.9
    with pytest.raises(ValueError, match="outputs 0 and 5"):
        analyse(net, x, torch.where(y == 1, 5, 0), (0, 5))
    with pytest.raises(TypeError, match="tensor"):
        analyse(net, x.numpy(), y, (0, 2))


def test_breast_cancer_unscaled():
    X, y = load_breast_cancer(return_X_y=True)
    path = RidgePath(X, y, np.logspace(8, -8, 30))
    assert path.angles[0] < 1
    assert path.angles[-1] > 85


def test_the_panel_measures_a_linear_network_exactly():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(30, 5) + 3 * torch.eye(5)[k] for k in range(3)])
    y = torch.arange(3).repeat_interleave(30)
    net = nn.Sequential(nn.Linear(5, 3))
    panel = BoundaryAngles(examples=30).look(net, data=Examples((x, y)))
    assert 2 <= len(panel.record["pairs"]) <= 3
    for row in panel.record["pairs"]:
        pair = (int(row["class"]), int(row["next"]))
        rows = (y == pair[0]) | (y == pair[1])
        assert row["angle, degrees"] == pytest.approx(analyse(net[0], x[rows], y[rows], pair).angle, abs=1e-3)
    assert "degrees from the line" in panel.sentences[0]
    with pytest.raises(ValueError, match="two classes"):
        BoundaryAngles().look(net, data=Examples((x, torch.zeros_like(y))))
