"""GBNN against its definitions, scikit-learn's own checks, and one plain network."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from torchfolio.efficiency import boosted_network
from torchfolio.efficiency.gbnn import (
    BinaryLoss,
    GBNNClassifier,
    GBNNRegressor,
    MulticlassLoss,
    SquaredLoss,
    block_objective,
    boost_head,
    fit_block,
    initial_block,
)
from torchfolio.models import ConvNet

SMALL = {"total_units": 12, "units_per_step": 3, "learning_rate": 0.5, "max_iter": 30, "random_state": 0}


@parametrize_with_checks(
    [
        GBNNClassifier(total_units=20, units_per_step=4, learning_rate=0.5, max_iter=25),
        GBNNRegressor(total_units=20, units_per_step=4, learning_rate=0.5, max_iter=25),
    ]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def two_targets():
    X, y = load_diabetes(return_X_y=True)
    return X[:120], np.column_stack([y, X[:, 2] * y + 3])[:120]


def subset(loader, n=120):
    X, y = loader(return_X_y=True)
    rows = np.random.RandomState(0).permutation(len(y))[:n]
    return X[rows], y[rows]


TASKS = [
    pytest.param(GBNNClassifier, lambda: subset(load_breast_cancer), id="binary"),
    pytest.param(GBNNClassifier, lambda: subset(load_wine), id="multiclass"),
    pytest.param(GBNNRegressor, lambda: subset(load_diabetes), id="regression"),
    pytest.param(GBNNRegressor, two_targets, id="two-targets"),
]


@pytest.mark.parametrize(("kind", "data"), TASKS)
@pytest.mark.parametrize("activation", ["logistic", "tanh", "relu"])
def test_assembled_network_is_the_boosted_sum(kind, data, activation, monkeypatch):
    X, y = data()
    blocks = []

    def record(*args, **kwargs):
        blocks.append(fit_block(*args, **kwargs)[0])
        return blocks[-1], 1

    monkeypatch.setattr(boosted_network, "fit_block", record)
    model = kind(**SMALL, activation=activation).fit(X, y)
    scaler = StandardScaler().fit(X)
    Z = (X - scaler.mean_) / scaler.scale_
    m = 2 if kind is GBNNClassifier and len(model.classes_) == 2 else 1
    F = np.tile(model.staged_intercepts_[0] / m, (len(X), 1))
    unit = y.std(0) if kind is GBNNRegressor else 1.0  # that of what blocks say of numbers
    staged = list(model.staged_decision_function(X) if kind is GBNNClassifier else model.staged_predict(X))
    whole = model.decision_function if kind is GBNNClassifier else model.predict
    assert len(staged) == len(blocks) == 4
    for t, (block, step) in enumerate(zip(blocks, model.steps_, strict=True), start=1):
        F = F + step * block(Z, activation) * unit
        expected = m * F.reshape(staged[0].shape)
        atol = 1e-10 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(staged[t - 1], expected, rtol=0, atol=atol)
        np.testing.assert_allclose(whole(X, n_units=3 * t), expected, rtol=0, atol=atol)
        np.testing.assert_allclose(_outputs(model.truncate(3 * t), X), expected, rtol=0, atol=atol)


def _outputs(model, X):
    return model.decision_function(X) if isinstance(model, GBNNClassifier) else model.predict(X)


@pytest.mark.parametrize(("kind", "data"), TASKS)
def test_module_gives_the_same_logits(kind, data):
    X, y = data()
    scale = np.abs(X).max(0)  # values of order one, as float32 resolves them
    model = kind(**SMALL).fit(X / scale, y / np.abs(y).max() if kind is GBNNRegressor else y)
    for n_units in (3, 12, None):
        module = model.to_module(n_units)
        expected = _outputs(model if n_units is None else model.truncate(n_units), X / scale)
        assert [name for name, _ in module.named_children()] == ["hidden", "activation", "head"]
        with torch.no_grad():
            single = module(torch.tensor(X / scale, dtype=torch.float32)).numpy()
            double = model.to_module(n_units, dtype=torch.float64)(torch.tensor(X / scale)).numpy()
        np.testing.assert_allclose(single.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(double.reshape(expected.shape), expected, rtol=0, atol=1e-10)


def test_probabilities_are_sigmoid_of_twice_the_score():
    X, y = subset(load_breast_cancer)
    model = GBNNClassifier(**SMALL).fit(X, y)
    F = model.decision_function(X) / 2
    np.testing.assert_allclose(model.predict_proba(X)[:, 1], 1 / (1 + np.exp(-2 * F)), atol=1e-12)
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1, atol=1e-12)
    assert np.array_equal(model.predict(X), model.classes_[(F > 0).astype(int)])


LOSSES = {
    "squared": (SquaredLoss(), lambda rng: rng.normal(size=(50, 2))),
    "binary": (BinaryLoss(), lambda rng: rng.choice([-1.0, 1.0], (50, 1), p=[0.3, 0.7])),
    "multiclass": (MulticlassLoss(), lambda rng: np.eye(4)[rng.randint(4, size=50)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_start_is_stationary(name):
    loss, targets = LOSSES[name]
    y = targets(np.random.RandomState(0))
    F = np.tile(loss.start(y), (len(y), 1))
    np.testing.assert_allclose(loss.residual(y, F).sum(0), 0, atol=1e-10)
    assert loss.value(y, F) < loss.value(y, F + 0.1) or name == "multiclass"  # softmax ignores a common shift


def torch_loss(name, y, F):
    if name == "squared":
        return 0.5 * (y - F).square().sum()
    if name == "binary":
        return nn.functional.softplus(-2 * y * F).sum()
    return -(y * F.log_softmax(1)).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_residual_is_minus_the_gradient(name):
    loss, targets = LOSSES[name]
    rng = np.random.RandomState(1)
    y = targets(rng)
    F = rng.normal(size=y.shape)
    score = torch.tensor(F, requires_grad=True)
    total = torch_loss(name, torch.tensor(y), score)
    (gradient,) = torch.autograd.grad(total, score)
    np.testing.assert_allclose(loss.residual(y, F), -gradient.numpy(), atol=1e-10)
    np.testing.assert_allclose(loss.value(y, F), total.item() / len(y), atol=1e-10)


@pytest.mark.parametrize("name", ["binary", "multiclass"])
def test_step_is_newton_with_the_diagonal_hessian(name):
    loss, targets = LOSSES[name]
    rng = np.random.RandomState(2)
    y = targets(rng)
    F, f = rng.normal(size=y.shape), rng.normal(size=y.shape)

    def total(score):
        return torch_loss(name, torch.tensor(y), score)

    score = torch.tensor(F)
    slope = (torch.func.grad(total)(score).numpy() * f).sum()
    size = F.size
    hessian = torch.func.hessian(total)(score).reshape(size, size).diagonal().numpy().reshape(F.shape)
    np.testing.assert_allclose(loss.step(y, F, f), -slope / (hessian * f**2).sum(), rtol=1e-6)


def test_extreme_scores_stay_finite():
    for name, (loss, targets) in LOSSES.items():
        y = targets(np.random.RandomState(0))
        for F in (1e4 * y, -1e4 * y):
            assert np.isfinite(loss.residual(y, F)).all(), name
            assert np.isfinite(loss.value(y, F)), name


@pytest.mark.parametrize("activation", ["logistic", "tanh", "relu"])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_gradient_of_a_block(activation, n_outputs):
    rng = np.random.RandomState(0)
    X, R = rng.normal(size=(20, 5)), rng.normal(size=(20, n_outputs))
    objective = block_objective(X, R, 4, 0.3, activation)
    theta = initial_block(rng, 5, 4, n_outputs, activation).flat()
    assert len(theta) == 4 * (5 + 1 + n_outputs) + n_outputs
    error = check_grad(lambda v: objective(v)[0], lambda v: objective(v)[1], theta)
    assert error < 1e-5


def test_one_full_block_is_one_plain_network():
    X, y = subset(load_diabetes, 200)
    X = StandardScaler().fit_transform(X)
    plain = MLPRegressor(
        hidden_layer_sizes=(5,), activation="logistic", solver="lbfgs", alpha=1e-2, max_iter=40, tol=0, random_state=7
    )
    with pytest.warns(UserWarning, match="lbfgs failed to converge"):
        plain.fit(X, np.round((y - y.mean()) / y.std() * 2**24) / 2**24)
    model = GBNNRegressor(
        5, 5, learning_rate=1, subsample=1, max_iter=40, alpha=1e-2, standardize=False, random_state=7
    ).fit(X, y)
    np.testing.assert_allclose(model.predict(X), y.mean() + y.std() * plain.predict(X), rtol=1e-6)
    np.testing.assert_allclose(model.coefs_[0], plain.coefs_[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-200, 1e-12, 1e-6, 0.3048, 3.28, 1e6, 1e150])
def test_the_unit_of_the_target_does_not_matter(unit):
    X, y = subset(load_diabetes, 200)
    y = np.stack([y, -3 * y + X[:, 0]], 1)
    plain, other = (GBNNRegressor(12, 2, max_iter=20, random_state=0).fit(X, y * u) for u in (1.0, unit))
    assert plain.score(X, y) > 0.3
    np.testing.assert_allclose(other.predict(X), unit * plain.predict(X), rtol=1e-9)


@pytest.mark.parametrize("kind", [GBNNRegressor, GBNNClassifier])
def test_no_unit_is_amplified_by_a_long_descent(kind):
    """Single units fitted to a sine creep through flat valleys, in which the last digit of an input decides where they end."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-3, 3, (120, 2))
    y = np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=120)
    y = y if kind is GBNNRegressor else (y > 0).astype(int)
    settings = {"total_units": 30, "max_iter": 200, "random_state": 0, "validation_fraction": 0.2}
    plain = kind(**settings).fit(X, y)
    tolerance = 1e-9 * np.abs(_outputs(plain, X)).max()
    # Metres to feet, degrees Celsius to Fahrenheit, and each feature in a unit of its own.
    for scale, shift in ((3.28, 0.0), (1.8, 32.0), (np.array([1e-12, 100.0]), 0.0)):
        units = kind(**settings).fit(X * scale + shift, y)
        np.testing.assert_allclose(_outputs(units, X * scale + shift), _outputs(plain, X), rtol=0, atol=tolerance)
    if kind is GBNNRegressor:
        for scale, shift in ((3.28, 0.0), (1.8, 32.0), (1e-6, 0.0)):
            units = kind(**settings).fit(X, y * scale + shift)
            np.testing.assert_allclose(
                units.predict(X), plain.predict(X) * scale + shift, rtol=0, atol=tolerance * scale
            )


@pytest.mark.parametrize("subsample", [1.0, 0.5])
def test_swapped_labels_give_the_other_probability(subsample):
    X, y = subset(load_breast_cancer, 200)
    plain, swapped = (
        GBNNClassifier(20, 2, subsample=subsample, random_state=0).fit(X, labels) for labels in (y, 1 - y)
    )
    np.testing.assert_allclose(swapped.predict_proba(X)[:, 1], plain.predict_proba(X)[:, 0], atol=1e-6)


def test_training_loss_never_rises_for_regression():
    X, y = subset(load_diabetes, 200)
    model = GBNNRegressor(30, 2, learning_rate=0.3, subsample=1, random_state=0, max_iter=50).fit(X, y)
    loss = model.train_loss_
    assert len(loss) == 16
    assert loss[0] == pytest.approx(np.var(y) / 2)
    assert loss[-1] == pytest.approx(np.mean((y - model.predict(X)) ** 2) / 2)
    assert (loss[1:] <= loss[:-1] * (1 + 1e-6)).all()


def test_learns_digits():
    X, y = load_digits(return_X_y=True)
    model = GBNNClassifier(24, 8, learning_rate=0.5, max_iter=50, random_state=0).fit(X[:800], y[:800])
    assert model.score(X[800:], y[800:]) > 0.85
    staged = list(model.staged_score(X[800:], y[800:]))
    assert staged[-1] == model.score(X[800:], y[800:])
    assert staged[0] < staged[-1]


@pytest.mark.parametrize(("kind", "data"), TASKS)
def test_equal_seeds_give_equal_networks(kind, data):
    X, y = data()
    one, two = kind(**SMALL).fit(X, y), clone(kind(**SMALL)).fit(X, y)
    other = kind(**{**SMALL, "random_state": 1}).fit(X, y)
    for a, b, c in zip(one.coefs_ + one.intercepts_, two.coefs_ + two.intercepts_, other.coefs_, strict=False):
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)


def test_standardising_is_folded_into_the_weights():
    X, y = subset(load_breast_cancer)
    inside = GBNNClassifier(**SMALL).fit(X, y)
    scaler = StandardScaler().fit(X)
    Z = np.round(scaler.transform(X) * 2**24) / 2**24  # in single precision
    outside = GBNNClassifier(**SMALL, standardize=False).fit(Z, y)
    np.testing.assert_allclose(
        inside.decision_function(X), outside.decision_function(scaler.transform(X)), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize(("kind", "data"), TASKS)
def test_starting_at_zero(kind, data):
    X, y = data()
    model = kind(**SMALL, init="zero").fit(X, y)
    assert (model.staged_intercepts_[0] == 0).all()


def test_held_out_part_cuts_to_the_best_prefix():
    X, y = subset(load_diabetes, 150)
    settings = {"total_units": 60, "learning_rate": 1.0, "validation_fraction": 0.3, "random_state": 0, "max_iter": 30}
    model = GBNNRegressor(**settings, n_iter_no_change=4).fit(X, y)
    best = int(np.argmin(model.validation_loss_)) + 1
    assert len(model.validation_loss_) == best + 4
    assert model.n_units_ == best == len(model.steps_) == len(model.train_loss_) - 1
    whole = GBNNRegressor(**settings).fit(X, y)
    assert len(whole.validation_loss_) == 60
    X, y = subset(load_wine)
    assert GBNNClassifier(**SMALL, validation_fraction=0.2, n_iter_no_change=2).fit(X, y).score(X, y) > 0.9


def test_nothing_left_to_explain_stops_early():
    X = np.zeros((20, 3))  # no feature tells anything: blocks fit residuals of mean zero by the constant zero
    model = GBNNClassifier(**{**SMALL, "alpha": 1.0, "max_iter": 200}, subsample=1.0).fit(X, np.arange(20) % 2)
    assert model.n_units_ >= 3
    assert np.isfinite(model.predict_proba(X)).all()
    np.testing.assert_allclose(model.predict_proba(X), 0.5, atol=1e-3)


def test_vanishing_curvature_keeps_the_blocks_there_are(monkeypatch):
    X, y = subset(load_wine)
    steps = iter([0.5, None])
    monkeypatch.setattr(MulticlassLoss, "step", lambda self, *args: next(steps))
    assert GBNNClassifier(**SMALL).fit(X, y).n_units_ == 3
    monkeypatch.setattr(MulticlassLoss, "step", lambda self, *args: None)
    constant = GBNNClassifier(**SMALL).fit(X, y)
    assert constant.n_units_ == 3
    assert np.ptp(constant.decision_function(X), axis=0).max() == 0


def test_units_are_rounded_down_to_whole_blocks():
    X, y = subset(load_wine)
    model = GBNNClassifier(total_units=11, units_per_step=4, max_iter=5).fit(X, y)
    assert model.n_units_ == 8
    assert model.coefs_[0].shape == (13, 8)
    assert model.coefs_[1].shape == (8, 3)


def test_text_labels_and_float32_features():
    X, y = subset(load_wine)
    names = np.array(["red", "white", "rose"])[y]
    model = GBNNClassifier(**SMALL).fit(X.astype(np.float32), names)
    assert set(model.predict(X)) <= {"red", "white", "rose"}


def test_copies_pickles_and_truncation_leave_the_model_alone():
    X, y = subset(load_wine)
    model = GBNNClassifier(**SMALL).fit(X, y)
    before = model.decision_function(X)
    small = model.truncate(6)
    small.coefs_[0][:] = 0
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert np.array_equal(other.decision_function(X), before)
    assert small.n_units_ == 6
    model.set_params(units_per_step=5, activation="relu")
    assert np.array_equal(model.decision_function(X, n_units=12), before)  # as fitted, not as set since


def test_grid_search():
    X, y = subset(load_wine)
    search = GridSearchCV(GBNNClassifier(**{**SMALL, "max_iter": 5}), {"learning_rate": [0.1, 1.0]}, cv=2).fit(X, y)
    assert search.best_params_["learning_rate"] in (0.1, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units_per_step": 13}, "at most total_units, got 13 and 12"),
        ({"units_per_step": 0}, "units_per_step"),
        ({"total_units": 0}, "total_units"),
        ({"subsample": 0.0}, "subsample"),
        ({"subsample": 1.1}, "subsample"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_iter": 0}, "max_iter"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha to be finite"),
        ({"alpha": float("inf")}, "alpha to be finite"),
        ({"learning_rate": float("nan")}, "learning_rate to be finite"),
        ({"subsample": float("nan")}, "subsample to be finite"),
        ({"activation": "gelu"}, "activation"),
        ({"init": "mean"}, "init"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": 0.1, "n_iter_no_change": 0}, "n_iter_no_change"),
        ({"n_iter_no_change": 3}, "validation_fraction with n_iter_no_change"),
    ],
)
def test_bad_settings(settings, message):
    X, y = subset(load_wine)
    for kind in (GBNNClassifier, GBNNRegressor):
        with pytest.raises(ValueError, match=message):
            kind(**{**SMALL, **settings}).fit(X, y)


def test_bad_data():
    X, y = subset(load_wine)
    with pytest.raises(TypeError, match="total_units"):
        GBNNClassifier(total_units=2.5).fit(X, y)
    with pytest.raises(ValueError, match="two classes"):
        GBNNClassifier().fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="NaN"):
        GBNNClassifier().fit(np.full_like(X, np.nan), y)
    with pytest.raises(ValueError, match="1d array"):
        GBNNClassifier().fit(X, np.eye(3, dtype=int)[y])
    with pytest.raises(ValueError, match="Unknown label type"):
        GBNNClassifier().fit(X, X[:, 0])


@pytest.mark.parametrize("n_units", [0, 4, 15, -3])
def test_bad_cuts(n_units):
    X, y = subset(load_wine)
    model = GBNNClassifier(**{**SMALL, "max_iter": 3}).fit(X, y)
    for cut in (model.truncate, model.to_module, lambda n: model.predict(X, n_units=n)):
        with pytest.raises(ValueError, match=f"multiple of units_per_step=3 up to 12, got {n_units}"):
            cut(n_units)


def backbones():
    torch.manual_seed(0)
    vectors = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU())
    return [nn.Sequential(*list(ConvNet(in_channels=1, num_classes=3).children())[:-1]), vectors]


@pytest.mark.parametrize("which", [0, 1])
def test_head_on_a_deep_network(which):
    backbone = backbones()[which]
    before = copy.deepcopy(backbone.state_dict())
    x, y = torch.randn(60, 1, 8, 8), torch.arange(60) % 3
    boosted = boost_head(backbone, (x, y), batch_size=25, **SMALL)
    assert backbone.training
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert isinstance(boosted.estimator, GBNNClassifier)
    assert boosted.features.dim() == 2
    with torch.no_grad():
        logits = boosted.network.eval()(x)
    expected = boosted.estimator.decision_function(boosted.features.numpy())
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def test_head_for_regression_in_double():
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40)
    boosted = boost_head(nn.Linear(6, 4).double(), (x, y), **SMALL)
    assert isinstance(boosted.estimator, GBNNRegressor)
    assert boosted.network(x).dtype == torch.float64
    assert boosted.network(x).shape == (40, 1)
