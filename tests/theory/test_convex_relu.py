"""Convex training against exact solutions, closed forms, and scikit-learn's conventions."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from torchfolio.errors import MissingDependency
from torchfolio.theory.convergence import Convergence
from torchfolio.theory.convex_relu import (
    ConvexReLUClassifier,
    ConvexReLURegressor,
    Solution,
    activation_patterns,
    admm,
    conic_program,
    convex_objective,
    data_loss,
    network_from_blocks,
    network_output,
    nonconvex_objective,
    pattern_count_bound,
    patterns_needed,
    sample_neurons,
    sampled_convex_program,
)
from torchfolio.theory.convex_relu.u_steps import BlockDescent, Woodbury

quiet = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sine(n: int = 10) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1.5, 1.5, n, dtype=torch.float64)[:, None]
    return torch.cat([x, torch.ones_like(x)], 1), torch.sin(3 * x[:, 0])


def sine_optimum() -> Solution:
    X, y = sine()
    return admm(X, y, activation_patterns(X, "all"), beta=0.1, tol=1e-6, balance=True)


def table(n: int = 40, d: int = 5, patterns: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5
    y = torch.sign(X[:, 0] * X[:, 1] + 0.1)
    return X, y, activation_patterns(X, patterns, generator=generator)


def infeasibility(X: Tensor, D: Tensor, blocks: Tensor) -> float:
    E = 2 * D.T.to(X) - 1
    return float((-(E * (blocks @ X.T))).max())


# Patterns


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_all_patterns_of_the_plane_number_two_n(n):
    X, _ = sine(n)
    D = activation_patterns(X, "all")
    assert D.shape == (n, 2 * n)
    assert pattern_count_bound(n, 2) == 2 * n
    assert len(torch.unique(D, dim=1).T) == D.shape[1]


@pytest.mark.parametrize("d", [1, 3, 4])
def test_all_patterns_meet_the_bound_in_general_position(d):
    X = torch.randn(6, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    D = activation_patterns(X, "all")
    assert D.shape[1] == pattern_count_bound(6, d)
    sampled = activation_patterns(X, 20 if d > 1 else 2, generator=torch.Generator().manual_seed(0))
    every = {tuple(c.tolist()) for c in D.T}
    assert {tuple(c.tolist()) for c in sampled.T} <= every


def test_degenerate_rows_are_enumerated():
    # A repeated example, its negative and a zero row: two cells, each with the zero row active.
    X = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    D = activation_patterns(X, "all")
    assert sorted(D.T.tolist()) == [[False, False, True, True], [True, True, False, True]]


def test_patterns_are_distinct_reproducible_and_nested():
    X, _, _ = table()
    few, many = (activation_patterns(X, n, generator=torch.Generator().manual_seed(5)) for n in (20, 20))
    assert torch.equal(few, many)
    assert len(torch.unique(few, dim=1).T) == 20


def test_few_patterns_warn_with_the_number():
    X, _ = sine(4)
    with pytest.warns(UserWarning, match="found 8 distinct activation patterns"):
        assert activation_patterns(X, 50, generator=torch.Generator().manual_seed(0)).shape == (4, 8)


def test_perturbed_patterns_include_those_of_the_perturbed_data():
    X = torch.tensor([[0.01, 1.0], [-0.01, 1.0]]).double()[:, :1]
    clean = {tuple(c.tolist()) for c in activation_patterns(X, "all").T}
    assert (True, True) not in clean
    D = activation_patterns(X, 4, epsilon=1.0, generator=torch.Generator().manual_seed(0))
    assert (True, True) in {tuple(c.tolist()) for c in D.T}


def test_with_a_bias_the_first_pattern_is_active_everywhere():
    X, _ = sine()
    D = activation_patterns(X, 5, 0.1, torch.Generator().manual_seed(0), bias=True)
    assert D.shape == (10, 5)
    assert D[:, 0].all()
    assert len(torch.unique(D, dim=1).T) == 5


def test_counts():
    assert pattern_count_bound(20, 3) == 2 * (1 + 19 + 171)
    assert pattern_count_bound(3, 10) == 8
    assert patterns_needed(0.1, 0.1, 9) == 247
    assert patterns_needed(0.001, 0.5, 99) == 428


@pytest.mark.parametrize(
    "call",
    [
        lambda X: activation_patterns(X, 0),
        lambda X: activation_patterns(X, "some"),
        lambda X: activation_patterns(X[0], 3),
        lambda X: activation_patterns(X, 3, -1.0),
        lambda X: activation_patterns(X, "all", 0.1),
        lambda X: activation_patterns(torch.randn(100, 5), "all"),
        lambda X: patterns_needed(0, 0.5, 10),
        lambda X: pattern_count_bound(0, 2),
    ],
)
def test_patterns_refuse_bad_input(call):
    with pytest.raises(ValueError, match=r"expected|only without"):
        call(torch.randn(10, 3))


# ADMM


@quiet
def test_all_linear_solvers_make_the_same_iterates():
    X, y, D = table()
    for cones in (True, False):
        blocks = [
            admm(X, y, D, beta=0.05, max_iter=60, linear_solver=name, cones=cones).blocks
            for name in ("woodbury", "dense", "cg")
        ]
        assert (blocks[0] - blocks[1]).abs().max() < 1e-9
        assert (blocks[0] - blocks[2]).abs().max() < 1e-9


@quiet
def test_iterates_follow_the_published_updates():
    X, y, D = table(10, 3, 4)
    n, d, P, rho, beta, gamma = 10, 3, 4, 0.3, 0.1, 0.15
    E = 2 * D.T.double() - 1
    F = torch.cat([D.T.double()[:, :, None] * X, -D.T.double()[:, :, None] * X]).transpose(0, 1).reshape(n, -1)
    G = torch.block_diag(*[E[i % P][:, None] * X for i in range(2 * P)])
    A = torch.eye(2 * P * d) + F.T @ F / rho + G.T @ G
    v, lam, s, nu = (torch.zeros(k, dtype=torch.float64) for k in (2 * P * d, 2 * P * d, 2 * P * n, 2 * P * n))
    for _ in range(25):
        u = torch.linalg.solve(A, F.T @ y / rho + v - lam + G.T @ (s - nu))
        blocks = (u + lam).view(2 * P, d)
        v = (blocks * (1 - beta / (rho * blocks.norm(dim=1, keepdim=True))).clamp_min(0)).flatten()
        s = (G @ u + nu).clamp_min(0)
        lam, nu = lam + gamma / rho * (u - v), nu + gamma / rho * (G @ u - s)
    ours = admm(X, y, D, beta=beta, rho=rho, gamma=gamma, max_iter=25, tol=0.0)
    assert torch.allclose(ours.blocks.flatten(), v, atol=1e-12)


def test_over_relaxation_reaches_the_same_solution_sooner():
    X, y, D = table(20, 3, 6)
    plain, far = (admm(X, y, D, beta=0.1, tol=1e-7, max_iter=20_000, relaxation=r) for r in (1.0, 1.8))
    assert far.convergence.n_iter < 0.7 * plain.convergence.n_iter
    assert far.objective == pytest.approx(plain.objective, rel=1e-6)
    for settings in ({"relaxation": 2.0}, {"relaxation": float("nan")}, {"relaxation": 1.5, "gamma": 0.05}):
        with pytest.raises(ValueError, match="relaxation"):
            admm(X, y, D, **settings)


def test_network_has_the_objective_of_the_convex_program():
    X, y = sine()
    D = activation_patterns(X, "all")
    solution = sine_optimum()
    network = nonconvex_objective(X, y, solution.hidden, solution.output, 0.1)
    assert solution.convergence.converged
    assert infeasibility(X, D, solution.blocks) < 1e-5
    assert abs(float(network) / solution.objective - 1) < 1e-5
    assert solution.objective == pytest.approx(float(convex_objective(X, y, D, solution.blocks, 0.1)))


def test_no_network_found_by_descent_is_better():
    X, y = sine()
    best = sine_optimum().objective
    torch.manual_seed(0)
    hidden = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    output = (torch.randn(40, dtype=torch.float64) / 6).requires_grad_()
    optimizer = torch.optim.Adam([hidden, output], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        value = nonconvex_objective(X, y, hidden, output, 0.1)
        value.backward()
        optimizer.step()
    assert best <= float(value.detach()) + 1e-3


@quiet
def test_more_patterns_never_raise_the_optimum():
    X, y, _ = table(12, 3)
    D = activation_patterns(X, 40, generator=torch.Generator().manual_seed(0))
    values = [admm(X, y, D[:, :n], beta=0.1, tol=1e-4, max_iter=500, balance=True).objective for n in (5, 15, 40)]
    assert all(b <= a + 1e-3 for a, b in zip(values, values[1:], strict=False))


@quiet
def test_balancing_does_not_run_away():
    """Residuals follow the penalty with a delay: changed as often as they are seen, it shrinks without end."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(200, 20, generator=g, dtype=torch.float64)
    X[:, -1] = 1
    y = torch.tanh(X.sum(1) / 20**0.5) + 0.1 * torch.randn(200, generator=g, dtype=torch.float64)
    solution = admm(X, y, activation_patterns(X, 20, generator=g), beta=1e-3, balance=True)
    assert 1e-4 < solution.convergence.to_frame()["rho"].iloc[-1] < 1e-2
    assert solution.objective == pytest.approx(0.018942, rel=2e-3)  # by a tolerance of 1e-6


@quiet
def test_relaxation_is_lower_and_its_network_worse():
    X, y = sine()
    D = activation_patterns(X, "all")
    exact, relaxed = (admm(X, y, D, beta=0.1, tol=1e-5, balance=True, cones=c) for c in (True, False))
    assert relaxed.objective < exact.objective
    assert nonconvex_objective(X, y, relaxed.hidden, relaxed.output, 0.1) > exact.objective


@pytest.mark.parametrize("loss", ["squared", "bce"])
def test_block_descent_finds_the_same_minimum(loss):
    X, y, D = table(12, 3, 4)
    M, gram, c = D.T.double(), X.T @ X, torch.ones(2, 4, 3, dtype=torch.float64)
    descent = BlockDescent(X, y, M, gram, loss, 0.5, torch.Generator().manual_seed(0))
    descent.limit, descent.most_sweeps = 1e-14, 500
    u, Xu = descent(c)
    exact, X_exact = Woodbury(X, y, M, gram, loss, 0.5)(c)
    assert torch.allclose(u, exact, atol=1e-5)
    assert torch.allclose(Xu, X_exact, atol=1e-5)
    # What the step minimises is flat there.
    exact.requires_grad_()
    prediction = ((exact[0] - exact[1]) @ X.T * M).sum(0)
    quadratic = (exact * (exact @ (torch.eye(3) + gram) - 2 * c)).sum() / 4
    (gradient,) = torch.autograd.grad(data_loss(prediction, y, loss) + quadratic, exact)
    assert gradient.abs().max() < 1e-8


@quiet
def test_cross_entropy_reaches_the_same_optimum_both_ways():
    X, y, D = table(20, 3, 4)
    newton = admm(X, y, D, beta=0.1, loss="bce", tol=1e-4, balance=True)
    descent = admm(X, y, D, beta=0.1, loss="bce", linear_solver="rbcd", max_iter=60)
    assert newton.convergence.converged
    assert descent.objective == pytest.approx(newton.objective, rel=1e-2)
    network = nonconvex_objective(X, y, newton.hidden, newton.output, 0.1, "bce")
    assert float(network) == pytest.approx(newton.objective, rel=1e-3)


def test_cap_warns_and_a_warm_start_goes_on():
    X, y, D = table()
    with pytest.warns(ConvergenceWarning, match=r"max_iter=10 with a primal residual of .*allowed"):
        first = admm(X, y, D, beta=0.1, max_iter=10)
    assert not first.convergence.converged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = admm(X, y, D, beta=0.1, max_iter=10, tol=0.0, start=first.state)
        both = admm(X, y, D, beta=0.1, max_iter=20, tol=0.0)
    assert torch.allclose(second.blocks, both.blocks, atol=1e-12)
    frame = both.convergence.to_frame()
    assert list(frame.columns) == ["primal", "dual", "rho", "objective"]
    assert len(frame) == both.convergence.n_iter == 20


@quiet
def test_single_precision_is_kept():
    X, y, D = table()
    solution = admm(X.float(), y.float(), D, beta=0.1, max_iter=50)
    assert solution.hidden.dtype == torch.float32
    assert solution.objective == pytest.approx(admm(X, y, D, beta=0.1, max_iter=50).objective, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta to be positive"),
        ({"loss": "hinge"}, "smooth loss"),
        ({"loss": "cubic"}, "expected loss"),
        ({"rho": -1.0}, "rho to be positive"),
        ({"linear_solver": "qr"}, "expected linear_solver"),
        ({"loss": "bce", "linear_solver": "dense"}, "squared loss"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": float("nan")}, "tol"),
        ({"start": (torch.zeros(2),)}, "expected a start"),
        ({"y": torch.arange(40.0), "loss": "bce"}, "labelled -1 and \\+1"),
        ({"y": torch.zeros(3)}, "expected X of shape"),
        ({"y": torch.full((40,), float("inf"))}, "finite"),
        ({"D": torch.ones(3, 4)}, "expected patterns"),
    ],
)
def test_admm_refuses_bad_input(change, message):
    X, y, D = table()
    with pytest.raises(ValueError, match=message):
        admm(**{"X": X, "y": y, "D": D, **change})


# Recovery and losses


def test_recovery_scales_neurons_and_drops_zeros():
    v = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    w = torch.tensor([[0.0, 0.0], [0.0, -4.0]])
    hidden, output = network_from_blocks(v, w)
    assert torch.allclose(output, torch.tensor([5.0**0.5, -2.0]))
    assert torch.allclose(hidden * output.abs()[:, None], torch.tensor([[3.0, 4.0], [0.0, -4.0]]))
    empty = network_from_blocks(torch.zeros(3, 2), torch.zeros(3, 2))
    assert empty[0].shape == (0, 2)
    assert empty[1].shape == (0,)


def test_losses_keep_the_published_factors():
    prediction, y = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 1.0, -1.0])
    assert torch.isclose(data_loss(prediction, y), ((prediction - y) ** 2).sum() / 2)
    published = torch.log(1 + torch.exp(2 * prediction)) - 2 * (y + 1) / 2 * prediction
    assert torch.isclose(data_loss(prediction, y, "bce"), published.sum())
    assert torch.isclose(data_loss(prediction, y, "hinge"), torch.tensor((0.7 + 2.2 + 3.0) / 3))


# Sampled programs


def test_sampled_program_is_optimal_and_equals_its_network():
    X, y, _ = table(15, 3)
    neurons = sample_neurons(30, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(neurons.norm(dim=1), torch.ones(30, dtype=torch.float64))
    for loss in ("squared", "bce"):
        solution = sampled_convex_program(X, y, neurons, beta=0.1, loss=loss, tol=1e-6, max_iter=20_000)
        network = nonconvex_objective(X, y, solution.hidden, solution.output, 0.1, loss)
        assert float(network) == pytest.approx(solution.objective, rel=1e-9)
        if loss == "squared":
            # The dual point is feasible up to the tolerance, and its value meets the primal one.
            residual = network_output(X, solution.hidden, solution.output) - y
            correlation = (torch.relu(X @ neurons.T).T @ residual).abs().max()
            assert correlation <= 0.1 * (1 + 1e-5)
            dual = -residual.square().sum() / 2 - residual @ y
            assert float(dual) == pytest.approx(solution.objective, rel=1e-5)


def test_nested_sampled_programs_fall_towards_the_optimum():
    X, y = sine()
    best = sine_optimum().objective
    neurons = sample_neurons(300, 2, torch.Generator().manual_seed(0))
    assert torch.equal(neurons[:20], sample_neurons(20, 2, torch.Generator().manual_seed(0)))
    values, start = [], None
    for n in (20, 100, 300):
        solution = sampled_convex_program(X, y, neurons[:n], beta=0.1, start=start, tol=1e-2, max_iter=20_000)
        values.append(solution.objective)
        start = solution.state
    assert values[0] >= values[1] >= values[2] >= best - 1e-5
    assert values[2] <= 1.03 * best


def test_sampled_program_refuses_bad_input():
    X, y, _ = table()
    neurons = sample_neurons(4, 5)
    with pytest.raises(ValueError, match="smooth loss"):
        sampled_convex_program(X, y, neurons, loss="hinge")
    with pytest.raises(ValueError, match="expected neurons"):
        sampled_convex_program(X, y, neurons[:, :3])
    with pytest.raises(ValueError, match="expected a start"):
        sampled_convex_program(X, y, neurons, start=(torch.zeros(9),))
    with pytest.raises(ValueError, match="at least one neuron"):
        sample_neurons(0, 3)


# Through CVXPY


def test_admm_reaches_the_conic_optimum():
    pytest.importorskip("cvxpy")
    X, y = sine()
    exact = conic_program(X, y, activation_patterns(X, "all"), beta=0.1)
    assert sine_optimum().objective == pytest.approx(exact.objective, abs=1e-4)
    X, y, D = table(20, 3, 8)
    exact = conic_program(X, y, D, beta=0.1, loss="bce")
    assert admm(X, y, D, beta=0.1, loss="bce", tol=3e-6, balance=True).objective == pytest.approx(
        exact.objective, abs=1e-4
    )


@pytest.mark.parametrize("loss", ["hinge", "squared", "bce"])
@pytest.mark.parametrize("norm", ["inf", "2", "1"])
def test_robust_program_is_the_exact_worst_case(loss, norm):
    pytest.importorskip("cvxpy")
    epsilon, beta = 0.05, 0.01
    X, y, _ = table(16, 2)
    X = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    generator = torch.Generator().manual_seed(0)
    D = activation_patterns(X, 20, epsilon, generator, bias=True)
    solution = conic_program(X, y, D, beta=beta, loss=loss, epsilon=epsilon, norm=norm, bias=True)
    term = solution.objective - beta * float(solution.blocks.norm(dim=-1).sum())
    g = (D.to(X) @ (solution.blocks[0] - solution.blocks[1]))[:, :2]
    # The squared loss is worst away from the target, the others against the label.
    away = (
        torch.sign((X * (D.to(X) @ (solution.blocks[0] - solution.blocks[1]))).sum(1) - y) if loss == "squared" else -y
    )

    def attacked(move: Tensor) -> float:
        moved = X + torch.cat([move, torch.zeros_like(move[:, :1])], 1)
        return float(data_loss(network_output(moved, solution.hidden, solution.output), y, loss))

    worst = {
        "inf": g.sign(),
        "2": g / g.norm(dim=1, keepdim=True).clamp_min(1e-12),
        "1": torch.nn.functional.one_hot(g.abs().argmax(1), 2) * g.sign(),
    }[norm]
    assert attacked(epsilon * away[:, None] * worst) == pytest.approx(term, abs=1e-5)
    for _ in range(20):
        move = torch.randn(16, 2, generator=generator, dtype=torch.float64)
        size = torch.linalg.vector_norm(move, {"inf": torch.inf, "2": 2, "1": 1}[norm], dim=1, keepdim=True)
        assert attacked(epsilon * move / size) <= term + 1e-5
    assert solution.objective >= conic_program(X, y, D, beta=beta, loss=loss).objective - 1e-6


def test_missing_cvxpy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cvxpy", None)
    X, y, D = table()
    with pytest.raises(MissingDependency, match="convex"):
        conic_program(X, y, D)
    with pytest.raises(ValueError, match="expected norm"):
        conic_program(X, y, D, norm="3")
    with pytest.raises(ValueError, match="expected epsilon"):
        conic_program(X, y, D, epsilon=-1.0)


# The record


def test_convergence_stops_warns_and_refuses_infinity():
    progress = Convergence("it", tol=0.1, max_iter=5)
    for k in progress:
        progress.record({"gap": (1 / k**2, 0.0)})
    assert progress.n_iter == 4
    progress = Convergence("it", tol=0.1, max_iter=2)
    steps = iter(progress)
    for _ in range(2):
        next(steps)
        progress.record({"gap": (1.0, 0.0)})
    with pytest.warns(ConvergenceWarning, match="gap residual of 1 "):
        next(steps, None)
    with pytest.raises(FloatingPointError, match="nan at iteration 1"):
        Convergence("it", tol=0.1, max_iter=2).record({"gap": (float("nan"), 0.0)})


# Estimators


@parametrize_with_checks(
    [ConvexReLURegressor("scp", n_patterns=20, max_iter=50), ConvexReLUClassifier(n_patterns=10, max_iter=20)]
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@quiet
@pytest.mark.parametrize("solver", ["admm", "scp"])
@pytest.mark.parametrize("fit_bias", [True, False])
def test_module_gives_the_same_outputs(solver, fit_bias):
    X, y = load_iris(return_X_y=True)
    X = X / 10
    for labels in (y, y == 2):
        model = ConvexReLUClassifier(solver, n_patterns=20, max_iter=100, fit_bias=fit_bias, random_state=0)
        model.fit(X, labels)
        module = model.to_module()
        outputs = module(torch.from_numpy(X).float()).detach().numpy()
        assert np.allclose(
            outputs.squeeze(-1) if outputs.shape[1] == 1 else outputs, model.decision_function(X), atol=1e-4
        )
        assert next(model.to_module(torch.float64).parameters()).dtype == torch.float64
        assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()
        again = pickle.loads(pickle.dumps(model))
        assert np.array_equal(again.predict(X), model.predict(X))
        assert model.score(X, labels) > 0.85
    assert set(model.history_.index.names) == {"output", "iteration"}


@quiet
def test_probabilities_need_the_cross_entropy():
    X, y = load_iris(return_X_y=True)
    assert not hasattr(ConvexReLUClassifier(), "predict_proba")
    model = ConvexReLUClassifier(loss="bce", n_patterns=10, max_iter=30, random_state=0).fit(X / 10, y)
    probabilities = model.predict_proba(X / 10)
    assert np.allclose(probabilities.sum(1), 1)
    assert np.array_equal(probabilities.argmax(1), model.predict(X / 10))


@quiet
@pytest.mark.parametrize("solver", ["admm", "scp"])
def test_estimator_warm_start_continues(solver):
    X, y = sine()
    make = {"solver": solver, "n_patterns": 15, "beta": 0.1, "tol": 1e-9, "random_state": 0, "max_iter": 40}
    warm = ConvexReLURegressor(**make, warm_start=True).fit(X[:, :1], y)
    before = warm.history_.iloc[-1]
    warm.fit(X[:, :1], y)
    cold = ConvexReLURegressor(**make).fit(X[:, :1], y)
    column = "primal" if solver == "admm" else "objective"
    assert warm.history_.iloc[-1][column] < before[column]
    assert cold.history_.iloc[-1][column] == pytest.approx(before[column])


@quiet
def test_several_targets_are_separate_networks():
    X, y = sine()
    targets = np.stack([y, -y + 0.5], 1)
    model = ConvexReLURegressor(n_patterns=20, beta=0.1, random_state=0, max_iter=200).fit(X[:, :1], targets)
    alone = ConvexReLURegressor(n_patterns=20, beta=0.1, random_state=0, max_iter=200).fit(X[:, :1], targets[:, 1])
    assert model.predict(X[:, :1]).shape == (10, 2)
    assert np.allclose(model.predict(X[:, :1])[:, 1], alone.predict(X[:, :1]))
    assert model.to_module()(torch.zeros(3, 1)).shape == (3, 2)


@quiet
def test_network_without_neurons_predicts_nothing():
    X, y = sine()
    model = ConvexReLURegressor(n_patterns=10, beta=1e4, random_state=0, max_iter=50).fit(X[:, :1], y)
    assert model.hidden_weights_.shape == (0, 2)
    assert np.array_equal(model.predict(X[:, :1]), np.zeros(10))
    assert torch.equal(model.to_module()(torch.ones(2, 1)), torch.zeros(2, 1))


def test_robust_estimator():
    pytest.importorskip("cvxpy")
    X, y = load_iris(return_X_y=True)
    X, y = X[50::4, 2:] / 10, y[50::4]
    model = ConvexReLUClassifier("cvxpy", loss="hinge", epsilon=0.01, n_patterns=15, random_state=0).fit(X, y)
    assert model.score(X, y) > 0.8
    assert model.converged_


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.1}, "needs solver='cvxpy'"),
        ({"epsilon": -0.1}, "expected epsilon"),
        ({"beta": 0}, "expected beta"),
        ({"beta": float("inf")}, "expected beta"),
        ({"norm": "3"}, "expected norm"),
        ({"linear_solver": "qr"}, "expected linear_solver"),
        ({"solver": "sgd"}, "expected solver"),
        ({"loss": "l1"}, "expected loss"),
        ({"n_patterns": 0}, "expected n_patterns"),
        ({"solver": "scp", "n_patterns": "all"}, "expected n_patterns"),
        ({"n_patterns": True}, "expected n_patterns"),
    ],
)
def test_estimators_refuse_bad_settings(settings, message):
    X, y = sine()
    with pytest.raises((TypeError, ValueError), match=message):
        ConvexReLUClassifier(**settings).fit(X, y > 0)
    if "loss" not in settings:
        with pytest.raises(ValueError, match="squared loss for regression"):
            ConvexReLURegressor(loss="hinge").fit(X, y)


def test_cross_entropy_of_a_table_is_solved_where_long_steps_fail():
    pytest.importorskip("cvxpy")
    X, y = load_breast_cancer(return_X_y=True)
    X, y = torch.as_tensor(StandardScaler().fit_transform(X)[:200]), torch.as_tensor(2.0 * y[:200] - 1)
    D = activation_patterns(X, 20, generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = conic_program(X, y, D, beta=1e-2, loss="bce")
    assert solution.convergence.converged
    hidden, output = solution.hidden, solution.output
    logits = torch.relu(X @ hidden.T) @ output
    value = torch.nn.functional.softplus(-2 * y * logits).sum() + 1e-2 * (hidden.norm(dim=1) * output.abs()).sum()
    assert solution.objective == pytest.approx(float(value), rel=1e-5)


def test_a_solver_that_is_not_there_is_refused():
    pytest.importorskip("cvxpy")
    X, y, D = table()
    with pytest.raises(ValueError, match=r"expected solver to be .*'CLARABEL'.*, got 'nope'"):
        conic_program(X, y, D, solver="nope")
