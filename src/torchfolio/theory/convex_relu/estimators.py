"""The scikit-learn estimators.

Longer than most because regressor and classifier share settings, solvers and pruning, in one base class.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn

from torchfolio.checks import at_least, one_of, positive, whole
from torchfolio.theory.convex_relu.admm import LinearSolver, admm
from torchfolio.theory.convex_relu.patterns import activation_patterns
from torchfolio.theory.convex_relu.program import Loss, Solution, nonconvex_objective
from torchfolio.theory.convex_relu.robust import Norm, conic_program
from torchfolio.theory.convex_relu.scp import sample_neurons, sampled_convex_program

__all__ = ["ConvexReLUClassifier", "ConvexReLURegressor"]

RELAXATION = 1.8  # the same optimum in nearly half the iterations
SolverName = Literal["admm", "scp", "cvxpy"]


class _ConvexReLU(BaseEstimator):
    """What the two estimators share: a network for each target column, of shared patterns or neurons."""

    # Said here because an assignment would widen them to plain text.
    solver: SolverName
    loss: Loss
    norm: Norm
    linear_solver: LinearSolver

    def __init__(
        self,
        solver: SolverName = "admm",
        *,
        n_patterns: int | Literal["all"] = 50,
        beta: float = 1e-3,
        loss: Loss = "squared",
        epsilon: float = 0.0,
        norm: Norm = "inf",
        rho: float = 0.1,
        gamma: float | None = None,
        balance: bool = False,
        max_iter: int = 2000,
        tol: float = 1e-4,
        fit_bias: bool = True,
        linear_solver: LinearSolver = "auto",
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.solver = solver
        self.n_patterns = n_patterns
        self.beta = beta
        self.loss = loss
        self.epsilon = epsilon
        self.norm = norm
        self.rho = rho
        self.gamma = gamma
        self.balance = balance
        self.max_iter = max_iter
        self.tol = tol
        self.fit_bias = fit_bias
        self.linear_solver = linear_solver
        self.warm_start = warm_start
        self.random_state = random_state

    def _check_parameters(self) -> None:
        one_of("solver", self.solver, get_args(SolverName))
        one_of("loss", self.loss, get_args(Loss))
        one_of("norm", self.norm, get_args(Norm))
        one_of("linear_solver", self.linear_solver, get_args(LinearSolver))
        if self.n_patterns == "all":
            one_of("n_patterns='all' with solver", self.solver, ("admm", "cvxpy"))
        else:
            whole("n_patterns", self.n_patterns, 1)
        whole("max_iter", self.max_iter, 1)
        if self.gamma is not None:
            positive("gamma", self.gamma)
        for name in ("beta", "rho", "tol"):
            positive(name, getattr(self, name))
        at_least("epsilon", self.epsilon, 0)
        if self.epsilon > 0 and self.solver != "cvxpy":
            raise ValueError(
                f"robust training, epsilon={self.epsilon!r}, needs solver='cvxpy', got solver={self.solver!r}"
            )

    def _fit(self, X: np.ndarray, targets: np.ndarray) -> None:
        """Train on targets `[n, K]`, one network for each column."""
        import pandas as pd

        data = self._with_bias(X)
        y = torch.from_numpy(np.ascontiguousarray(targets, dtype=np.float64))
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        design, states = self._design(data, y.shape[1], generator)
        solutions = [
            self._solve(data, column, design, state, generator)
            for column, state in zip(y.unbind(1), states, strict=True)
        ]
        if self.warm_start:
            self._warm = (self.solver, data, design, [solution.state or None for solution in solutions])
        self.hidden_weights_ = torch.cat([s.hidden for s in solutions]).numpy()
        self.output_weights_ = torch.block_diag(*[s.output[:, None] for s in solutions]).numpy()
        self.objective_ = sum(
            float(nonconvex_objective(data, column, s.hidden, s.output, self.beta, self.loss))
            for column, s in zip(y.unbind(1), solutions, strict=True)
        )
        self.n_iter_ = max(s.convergence.n_iter for s in solutions)
        self.converged_ = all(s.convergence.converged for s in solutions)
        histories = [s.convergence.to_frame().reset_index().assign(output=k) for k, s in enumerate(solutions)]
        self.history_ = pd.concat(histories).set_index(["output", "iteration"])

    def _design(
        self, data: Tensor, outputs: int, generator: torch.Generator
    ) -> tuple[Tensor, list[tuple[Tensor, ...] | None]]:
        """Patterns, or neurons of a sampled program, and where to start for each output."""
        warm = getattr(self, "_warm", None) if self.warm_start else None
        if warm is not None and warm[0] == self.solver and len(warm[3]) == outputs and torch.equal(warm[1], data):
            return warm[2], warm[3]
        cold: list[tuple[Tensor, ...] | None] = [None] * outputs
        if self.solver == "scp":
            return sample_neurons(int(self.n_patterns), data.shape[1], generator), cold
        count = "all" if self.n_patterns == "all" else int(self.n_patterns)
        return activation_patterns(data, count, self.epsilon, generator, bias=self.fit_bias), cold

    def _solve(
        self,
        data: Tensor,
        y: Tensor,
        design: Tensor,
        start: tuple[Tensor, ...] | None,
        generator: torch.Generator,
    ) -> Solution:
        common: dict[str, Any] = {
            "beta": self.beta,
            "loss": self.loss,
            "max_iter": self.max_iter,
            "tol": self.tol,
        }
        if self.solver == "scp":
            return sampled_convex_program(data, y, design, start=start, **common)
        if self.solver == "cvxpy":
            return conic_program(data, y, design, epsilon=self.epsilon, norm=self.norm, bias=self.fit_bias, **common)
        return admm(
            data,
            y,
            design,
            rho=self.rho,
            gamma=self.gamma,
            relaxation=RELAXATION if self.gamma is None else 1.0,
            balance=self.balance,
            linear_solver=self.linear_solver,
            start=start,
            generator=generator,
            **common,
        )

    def _with_bias(self, X: np.ndarray) -> Tensor:
        data = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float64))
        return torch.cat([data, torch.ones(len(data), 1, dtype=data.dtype)], 1) if self.fit_bias else data

    def _outputs(self, X: Any) -> np.ndarray:
        """The networks' outputs `[n, K]`."""
        check_is_fitted(self)
        checked: Any = validate_data(self, X, reset=False, dtype=np.float64)
        data = self._with_bias(checked).numpy()
        return np.maximum(data @ self.hidden_weights_.T, 0) @ self.output_weights_

    def to_module(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The trained network as a PyTorch module, from `[n, features]` to `[n, K]`.

        Its outputs are those of `decision_function` (or `predict` of the regressor), with a last axis of 1 where
        those have none.

        Args:
            dtype: dtype of its weights.

        Returns:
            `nn.Sequential(Linear, ReLU, Linear)`; the second layer has no bias.
        """
        check_is_fitted(self)
        neurons, outputs = self.output_weights_.shape
        weights = torch.from_numpy(self.hidden_weights_)
        features = weights.shape[1] - int(self.fit_bias)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # a network may have no neurons
            first = nn.Linear(features, neurons, bias=self.fit_bias, dtype=dtype)
            second = nn.Linear(neurons, outputs, bias=False, dtype=dtype)
        with torch.no_grad():
            first.weight.copy_(weights[:, :features])
            if first.bias is not None:
                first.bias.copy_(weights[:, features])
            second.weight.copy_(torch.from_numpy(self.output_weights_.T))
        return nn.Sequential(first, nn.ReLU(), second)


class ConvexReLURegressor(RegressorMixin, _ConvexReLU):
    """Regression by a network of one hidden ReLU layer, trained to its global optimum.

    Minimises $\\frac12 \\sum_k (\\hat y_k - y_k)^2 + \\frac\\beta2 \\sum_j (\\|u_j\\|^2 + \\alpha_j^2)$ over all
    networks $\\hat y = \\sum_j (Xu_j)_+ \\alpha_j$ whose neurons have one of the activation patterns considered. Several
    targets get a network each, of shared patterns.

    Args:
        solver: `"admm"`, the convex program over activation patterns; `"scp"`, the lasso over random neurons, simpler
            and rougher; `"cvxpy"`, a conic solver (extra `convex`), needed for robust training.
        n_patterns: activation patterns to consider (of `"scp"`: neurons to draw), or `"all"`, for few examples in
            few dimensions.
        beta: weight decay $\\beta$.
        loss: `"squared"`.
        epsilon: radius of the perturbations to train against; above 0 it needs `"cvxpy"`.
        norm: norm of the perturbations, `"inf"`, `"2"` or `"1"`.
        rho: penalty $\\rho$ of ADMM; it decides how fast the first iterations are.
        gamma: its dual step; `rho` by default.
        balance: whether ADMM adapts `rho`, which often saves most of the iterations to a tight tolerance.
        max_iter: maximum number of iterations.
        tol: tolerance, see the solvers.
        fit_bias: whether to add a column of ones, whose weights are decayed like the others.
        linear_solver: way in which ADMM takes its main step, see `admm`.
        warm_start: whether to begin the next fit on the same data where the last one ended.
        random_state: seed of the patterns.

    Attributes:
        hidden_weights_: `[m, features (+ 1)]`, the bias last.
        output_weights_: `[m, K]`.
        objective_: value above at the trained network.
        n_iter_: iterations made (most of all targets).
        converged_: whether every solver met its tolerance.
        history_: residuals by target and iteration.
        n_features_in_: number of features.

    Shapes:
        `X` is `[n, features]`, `y` `[n]` or `[n, K]`. Scale the features so that rows have a norm of about 1.

    Warns:
        ConvergenceWarning: at `max_iter`.
        UserWarning: when there are fewer distinct patterns than asked for.

    Raises:
        ValueError: on settings out of range, at `fit`.
        MissingDependency: for `solver="cvxpy"` without CVXPY.

    Example:
        >>> X = np.linspace(-1, 1, 20)[:, None]
        >>> model = ConvexReLURegressor(n_patterns="all", beta=0.1).fit(X, np.sin(3 * X[:, 0]))
        >>> model.to_module()(torch.zeros(5, 1)).shape
        torch.Size([5, 1])

    Reference:
        Bai et al., SIAM J. Mathematics of Data Science 2023, https://arxiv.org/abs/2201.01965.
    """

    def fit(self, X: Any, y: Any) -> ConvexReLURegressor:
        """Train on features `[n, features]` and targets `[n]` or `[n, K]`."""
        self._check_parameters()
        if self.loss != "squared":
            raise ValueError(f"expected the squared loss for regression, got {self.loss!r}")
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        self._flat = y.ndim == 1
        self._fit(X, y.reshape(len(y), -1))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predictions, shaped like the targets were."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat else outputs

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _has_probabilities(estimator: ConvexReLUClassifier) -> bool:
    if estimator.loss != "bce":
        raise AttributeError(f"probabilities need loss='bce', got loss={estimator.loss!r}")
    return True


class ConvexReLUClassifier(ClassifierMixin, _ConvexReLU):
    """Classification by a network of one hidden ReLU layer, trained to its global optimum.

    Minimises $\\ell(\\hat y, y) + \\frac\\beta2 \\sum_j (\\|u_j\\|^2 + \\alpha_j^2)$, $y = \\pm 1$, over all networks
    $\\hat y = \\sum_j (Xu_j)_+ \\alpha_j$ whose neurons have one of the activation patterns considered. More than two
    classes get a network each (one against the rest), of shared patterns.

    Args:
        solver: `"admm"`, the convex program over activation patterns; `"scp"`, the lasso over random neurons, simpler
            and rougher; `"cvxpy"`, a conic solver (extra `convex`), needed for robust training and the hinge loss.
        n_patterns: activation patterns to consider (of `"scp"`: neurons to draw), or `"all"`, for few examples in
            few dimensions.
        beta: weight decay $\\beta$.
        loss: `"squared"`, `"bce"` (which brings `predict_proba`) or `"hinge"`; see `data_loss`.
        epsilon: radius of the perturbations to train against; above 0 it needs `"cvxpy"`.
        norm: norm of the perturbations, `"inf"`, `"2"` or `"1"`.
        rho: penalty $\\rho$ of ADMM; it decides how fast the first iterations are.
        gamma: its dual step; `rho` by default.
        balance: whether ADMM adapts `rho`, which often saves most of the iterations to a tight tolerance.
        max_iter: maximum number of iterations.
        tol: tolerance, see the solvers.
        fit_bias: whether to add a column of ones, whose weights are decayed like the others.
        linear_solver: way in which ADMM takes its main step, see `admm`.
        warm_start: whether to begin the next fit on the same data where the last one ended.
        random_state: seed of the patterns.

    Attributes:
        classes_: labels.
        hidden_weights_: `[m, features (+ 1)]`, the bias last.
        output_weights_: `[m, K]`; `K` is 1 for two classes.
        objective_: value above at the trained network, summed over classes.
        n_iter_: iterations made (most of all classes).
        converged_: whether every solver met its tolerance.
        history_: residuals by class and iteration.
        n_features_in_: number of features.

    Shapes:
        `X` is `[n, features]`, `y` `[n]`. Scale the features so that rows have a norm of about 1.

    Warns:
        ConvergenceWarning: at `max_iter`.
        UserWarning: when there are fewer distinct patterns than asked for.

    Raises:
        ValueError: on settings out of range, at `fit`.
        MissingDependency: for `solver="cvxpy"` without CVXPY.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> ConvexReLUClassifier(beta=0.1, tol=1e-3, random_state=0).fit(X / 10, y).score(X / 10, y) > 0.9
        True

    Reference:
        Bai et al., SIAM J. Mathematics of Data Science 2023, https://arxiv.org/abs/2201.01965.
    """

    def fit(self, X: Any, y: Any) -> ConvexReLUClassifier:
        """Train on features `[n, features]` and labels `[n]`."""
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"expected at least two classes, got one class, {self.classes_[0]!r}")
        columns = [1] if len(self.classes_) == 2 else range(len(self.classes_))
        self._fit(X, np.stack([np.where(codes == k, 1.0, -1.0) for k in columns], 1))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The networks' outputs: `[n]` for two classes (positive for the second), else `[n, K]`."""
        outputs = self._outputs(X)
        return outputs[:, 0] if len(self.classes_) == 2 else outputs

    def predict(self, X: Any) -> np.ndarray:
        """Labels `[n]`."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    @available_if(_has_probabilities)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[n, K]`, for `loss="bce"`; one-against-the-rest probabilities are normalised."""
        each = expit(2 * self._outputs(X))
        if each.shape[1] == 1:
            return np.hstack([1 - each, each])
        return each / each.sum(1, keepdims=True)
