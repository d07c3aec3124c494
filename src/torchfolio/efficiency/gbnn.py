"""GBNN: a one-hidden-layer network grown a few units at a time by gradient boosting.

Seyedsaman Emami, Gonzalo Martínez-Muñoz, "Sequential Training of Neural Networks with Gradient Boosting", IEEE
Access 11 (2023).

For tables, or for the features of a frozen deep network. Each round fits a tiny network to what is left to explain;
all of them are joined into *one ordinary network*, so nothing is boosted at prediction time, and the units trained
last can be switched off to save time. `GBNNClassifier` and `GBNNRegressor` are scikit-learn estimators; `to_module`
makes them a `torch.nn.Module`, and `boost_head` puts one on top of a deep network.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelEncoder, StandardScaler
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchfolio.measure.batches import Data, batches
from torchfolio.measure.untouched import untouched
from torchfolio.models.surgery import flatten_features

__all__ = [
    "BinaryLoss",
    "Block",
    "BoostedHead",
    "GBNNClassifier",
    "GBNNRegressor",
    "Loss",
    "MulticlassLoss",
    "SquaredLoss",
    "block_objective",
    "boost_head",
    "fit_block",
    "initial_block",
]

Array = NDArray[np.float64]
Activation = Literal["logistic", "tanh", "relu"]

_validated: Any = validate_data  # scikit-learn's defaults for X and y are strings, which misleads type checkers

MODULES: dict[str, type[nn.Module]] = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


class Loss(ABC):
    """What boosting needs of a loss; $y$ and $F$ are `[N, K]`.

    Attributes:
        factor: the logits of the assembled network are $F$ times this.
    """

    factor = 1.0

    @abstractmethod
    def start(self, y: Array) -> Array:
        """The constant $F_0$ `[K]` that minimises the mean loss."""

    @abstractmethod
    def value(self, y: Array, F: Array) -> float:
        """Mean loss."""

    @abstractmethod
    def residual(self, y: Array, F: Array) -> Array:
        """Minus the derivative of each example's loss, `[N, K]`."""

    @abstractmethod
    def step(self, y: Array, F: Array, f: Array) -> float | None:
        """Length $\\rho$ of the step from $F$ along $f$; `None` where the loss has no curvature left."""


class SquaredLoss(Loss):
    """$\\frac12 \\lVert y - F\\rVert^2$; the block was fitted by least squares already, so $\\rho = 1$."""

    def start(self, y: Array) -> Array:
        return y.mean(0)

    def value(self, y: Array, F: Array) -> float:
        return 0.5 * float(np.square(y - F).sum(1).mean())

    def residual(self, y: Array, F: Array) -> Array:
        return y - F

    def step(self, y: Array, F: Array, f: Array) -> float:
        return 1.0


class BinaryLoss(Loss):
    """$\\log(1 + e^{-2yF})$ for $y = \\pm 1$, so that $P(y = 1) = \\operatorname{sigmoid}(2F)$."""

    factor = 2.0

    def start(self, y: Array) -> Array:
        mean = y.mean(0)
        return 0.5 * np.log((1 + mean) / (1 - mean))

    def value(self, y: Array, F: Array) -> float:
        return float(np.logaddexp(0, -2 * y * F).mean())

    def residual(self, y: Array, F: Array) -> Array:
        return 2 * y * expit(-2 * y * F)

    def step(self, y: Array, F: Array, f: Array) -> float | None:
        r = BinaryLoss.residual(self, y, F)
        return _newton(np.sum(r * f), np.sum(r * f**2 * (2 * y - r)))


class MulticlassLoss(Loss):
    """$-\\sum_k y_k \\log\\operatorname{softmax}_k(F)$ for one-hot $y$; one step length for all classes."""

    def start(self, y: Array) -> Array:
        prior = np.log(y.mean(0))
        return prior - prior.mean()

    def value(self, y: Array, F: Array) -> float:
        return -float((y * log_softmax(F, axis=1)).sum(1).mean())

    def residual(self, y: Array, F: Array) -> Array:
        return y - softmax(F, axis=1)

    def step(self, y: Array, F: Array, f: Array) -> float | None:
        p = softmax(F, axis=1)
        return _newton(np.sum(f * (y - p)), np.sum(f**2 * p * (1 - p)))


def _newton(slope: float, curvature: float) -> float | None:
    return None if abs(curvature) < 1e-12 else float(slope / curvature)


class Block(NamedTuple):
    """A network of $J$ hidden units, $f(x) = W_2^\\top \\sigma(W_1^\\top x + b_1) + b_2$.

    Attributes:
        W1: `[D, J]`.
        b1: `[J]`.
        W2: `[J, K]`.
        b2: `[K]`.
    """

    W1: Array
    b1: Array
    W2: Array
    b2: Array

    def flat(self) -> Array:
        """All weights as one vector."""
        return np.concatenate([part.ravel() for part in self])

    @staticmethod
    def views(theta: Array, n_features: int, n_units: int, n_outputs: int) -> Block:
        """A block that looks into a vector of its weights."""
        D, J, K = n_features, n_units, n_outputs
        a, b, c = D * J, D * J + J, D * J + J + J * K
        return Block(theta[:a].reshape(D, J), theta[a:b], theta[b:c].reshape(J, K), theta[c:])

    def __call__(self, X: Array, activation: Activation) -> Array:
        """Outputs `[N, K]` for inputs `[N, D]`."""
        hidden = X @ self.W1
        hidden += self.b1
        _activate(hidden, activation)
        return hidden @ self.W2 + self.b2


def initial_block(
    rng: RandomState, n_features: int, n_units: int, n_outputs: int, activation: Activation = "logistic"
) -> Block:
    """Weights and biases uniform within $\\pm\\sqrt{a / (\\text{fan in} + \\text{fan out})}$, as scikit-learn's networks.

    $a$ is 2 for logistic units and 6 for the others.
    """
    factor = 2.0 if activation == "logistic" else 6.0

    def layer(fan_in: int, fan_out: int) -> tuple[Array, Array]:
        bound = np.sqrt(factor / (fan_in + fan_out))
        return rng.uniform(-bound, bound, (fan_in, fan_out)), rng.uniform(-bound, bound, fan_out)

    (W1, b1), (W2, b2) = layer(n_features, n_units), layer(n_units, n_outputs)
    return Block(W1, b1, W2, b2)


def block_objective(
    X: Array, R: Array, n_units: int, alpha: float, activation: Activation = "logistic"
) -> Callable[[Array], tuple[float, Array]]:
    """Ridge-penalised squared error of a block and its gradient, as a function of the block's weights.

    $$J = \\frac{1}{2n} \\lVert A W_2 + b_2 - R\\rVert_F^2 + \\frac{\\alpha}{2n} (\\lVert W_1\\rVert^2 +
    \\lVert W_2\\rVert^2), \\qquad A = \\sigma(X W_1 + b_1).$$

    Thousands of calls on small matrices are all that training does, so every intermediate has its buffer.

    Args:
        X: inputs `[n, D]`.
        R: residuals `[n, K]`.
        n_units: $J$.
        alpha: ridge $\\alpha$.
        activation: $\\sigma$.
    """
    n, sizes = len(X), (X.shape[1], n_units, R.shape[1])
    A, slope = np.empty((n, n_units)), np.empty((n, n_units))
    G, E = np.empty((n, n_units)), np.empty_like(R)
    gradient = np.empty(sizes[0] * n_units + n_units + n_units * sizes[2] + sizes[2])
    d = Block.views(gradient, *sizes)

    def objective(theta: Array) -> tuple[float, Array]:
        w = Block.views(theta, *sizes)
        np.dot(X, w.W1, out=A)
        np.add(A, w.b1, out=A)
        _activate(A, activation)
        np.dot(A, w.W2, out=E)
        np.add(E, w.b2, out=E)
        np.subtract(E, R, out=E)
        ridge = alpha * (np.vdot(w.W1, w.W1) + np.vdot(w.W2, w.W2))
        value = (np.vdot(E, E) + ridge) / (2 * n)
        np.multiply(E, 1 / n, out=E)
        np.dot(A.T, E, out=d.W2)
        np.add(d.W2, alpha / n * w.W2, out=d.W2)
        np.add.reduce(E, 0, out=d.b2)
        _slope(A, activation, out=slope)
        np.dot(E, w.W2.T, out=G)
        np.multiply(G, slope, out=G)
        np.dot(X.T, G, out=d.W1)
        np.add(d.W1, alpha / n * w.W1, out=d.W1)
        np.add.reduce(G, 0, out=d.b1)
        return float(value), gradient.copy()  # the optimizer keeps what it is given

    return objective


def fit_block(
    X: Array, R: Array, initial: Block, *, alpha: float, max_iter: int, activation: Activation = "logistic"
) -> tuple[Block, int]:
    """Minimise `block_objective` by full-batch L-BFGS from the initial weights, with no tolerance to stop at.

    Returns:
        The fitted block and the iterations made; fewer than `max_iter` only where the line search finds no descent.
    """
    (D, J), K = initial.W1.shape, R.shape[1]
    objective = block_objective(X, R, J, alpha, activation)
    options = {"maxiter": max_iter, "maxfun": 20 * max_iter, "ftol": 0.0, "gtol": 0.0}
    found = minimize(objective, initial.flat(), jac=True, method="L-BFGS-B", options=options)
    return Block.views(found.x, D, J, K), int(found.nit)


def _activate(Z: Array, activation: Activation) -> None:
    """Apply the activation in place."""
    if activation == "logistic":
        expit(Z, out=Z)
    elif activation == "tanh":
        np.tanh(Z, out=Z)
    else:
        np.maximum(Z, 0, out=Z)


def _slope(A: Array, activation: Activation, out: Array) -> None:
    """Derivative of the activation, from its value."""
    if activation == "relu":
        np.greater(A, 0, out=out, casting="unsafe")
        return
    np.multiply(A, A, out=out)
    np.subtract(A if activation == "logistic" else 1.0, out, out=out)


class _Grown(NamedTuple):
    """The result of boosting, in the coordinates that it ran in."""

    start: Array
    blocks: list[Block]
    steps: list[float]
    iterations: list[int]
    train_loss: list[float]
    validation_loss: list[float]


class _GBNN(BaseEstimator):
    """What classifier and regressor share: growing, assembling and cutting the network."""

    def __init__(
        self,
        total_units: int = 200,
        units_per_step: int = 1,
        learning_rate: float = 0.1,
        subsample: float = 0.5,
        max_iter: int = 200,
        alpha: float = 1e-4,
        activation: Activation = "logistic",
        init: Literal["prior", "zero"] = "prior",
        standardize: bool = True,
        n_iter_no_change: int | None = None,
        validation_fraction: float | None = None,
        random_state: int | RandomState | None = None,
    ) -> None:
        self.total_units = total_units
        self.units_per_step = units_per_step
        self.learning_rate = learning_rate
        self.subsample = subsample
        self.max_iter = max_iter
        self.alpha = alpha
        self.activation: Activation = activation
        self.init: Literal["prior", "zero"] = init
        self.standardize = standardize
        self.n_iter_no_change = n_iter_no_change
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def _check_parameters(self) -> None:
        """What a scikit-learn estimator is constructed with is looked at when it is fitted."""
        check_scalar(self.units_per_step, "units_per_step", Integral, min_val=1)
        check_scalar(self.total_units, "total_units", Integral, min_val=1)
        if self.units_per_step > self.total_units:
            raise ValueError(
                f"expected units_per_step to be at most total_units, got {self.units_per_step} and {self.total_units}"
            )
        check_scalar(self.learning_rate, "learning_rate", Real, min_val=0, include_boundaries="neither")
        check_scalar(self.subsample, "subsample", Real, min_val=0, max_val=1, include_boundaries="right")
        check_scalar(self.max_iter, "max_iter", Integral, min_val=1)
        check_scalar(self.alpha, "alpha", Real, min_val=0)
        if self.activation not in MODULES:
            raise ValueError(f"expected activation to be one of {', '.join(MODULES)}, got {self.activation!r}")
        if self.init not in ("prior", "zero"):
            raise ValueError(f"expected init to be 'prior' or 'zero', got {self.init!r}")
        if self.validation_fraction is not None:
            fraction = self.validation_fraction
            check_scalar(fraction, "validation_fraction", Real, min_val=0, max_val=1, include_boundaries="neither")
        if self.n_iter_no_change is not None:
            check_scalar(self.n_iter_no_change, "n_iter_no_change", Integral, min_val=1)
            if self.validation_fraction is None:
                raise ValueError("expected validation_fraction with n_iter_no_change, got None")

    def _fit(self, X: Array, Y: Array, loss: Loss, labels: Array | None) -> None:
        """Hold out, standardise, boost, assemble."""
        rng = check_random_state(self.random_state)
        held: tuple[Array, Array] | None = None
        if self.validation_fraction is not None:
            share = self.validation_fraction
            parts: Any = train_test_split(X, Y, test_size=share, stratify=labels, random_state=rng)
            X, X_held, Y, Y_held = parts
            held = X_held, Y_held
        mean, scale = np.zeros(X.shape[1]), np.ones(X.shape[1])
        if self.standardize:
            scaler = StandardScaler().fit(X)
            mean, scale = np.asarray(scaler.mean_), np.asarray(scaler.scale_)
        Z = np.ascontiguousarray((X - mean) / scale)
        grown = self._grow(Z, Y, loss, rng, held and ((held[0] - mean) / scale, held[1]))
        self._assemble(grown, loss, mean, scale)

    def _grow(self, Z: Array, Y: Array, loss: Loss, rng: RandomState, held: tuple[Array, Array] | None) -> _Grown:
        """The boosting loop: residuals, a block fitted to them, a step along it."""
        start = loss.start(Y) if self.init == "prior" else np.zeros(Y.shape[1])
        grown = _Grown(start, [], [], [], [], [])
        F = np.tile(start, (len(Y), 1))
        F_held = None if held is None else np.tile(start, (len(held[1]), 1))
        grown.train_loss.append(loss.value(Y, F))
        n_rows = max(1, int(self.subsample * len(Z)))
        for _ in range(self.total_units // self.units_per_step):
            R, rows = loss.residual(Y, F), slice(None)
            if n_rows < len(Z):
                rows = rng.permutation(len(Z))[:n_rows]
            initial = initial_block(rng, Z.shape[1], self.units_per_step, Y.shape[1], self.activation)
            block, iterations = fit_block(
                Z[rows], R[rows], initial, alpha=self.alpha, max_iter=self.max_iter, activation=self.activation
            )
            f = block(Z, self.activation)
            rho = loss.step(Y, F, f)
            if rho is None and grown.blocks:
                break
            step = self.learning_rate * (rho or 0.0)  # without any curvature the constant is all there is
            F += step * f
            grown.blocks.append(block)
            grown.steps.append(step)
            grown.iterations.append(iterations)
            grown.train_loss.append(loss.value(Y, F))
            if held is not None and F_held is not None:
                F_held += step * block(held[0], self.activation)
                grown.validation_loss.append(loss.value(held[1], F_held))
            if rho is None or self._is_stuck(grown.validation_loss):
                break
        return grown

    def _is_stuck(self, validation_loss: list[float]) -> bool:
        """Whether the last `n_iter_no_change` blocks brought no new best on the held-out part."""
        if self.n_iter_no_change is None:
            return False
        return len(validation_loss) - 1 - int(np.argmin(validation_loss)) >= self.n_iter_no_change

    def _assemble(self, grown: _Grown, loss: Loss, mean: Array, scale: Array) -> None:
        """Join the blocks into one network, with the standardisation and the steps folded into its weights."""
        blocks, m = grown.blocks, loss.factor
        W1 = np.hstack([b.W1 for b in blocks]) / scale[:, None]
        b1 = np.hstack([b.b1 for b in blocks]) - mean @ W1
        W2 = np.vstack([m * step * b.W2 for b, step in zip(blocks, grown.steps, strict=True)])
        shifts = [m * grown.start, *[m * step * b.b2 for b, step in zip(blocks, grown.steps, strict=True)]]
        self.staged_intercepts_ = np.cumsum(shifts, axis=0)
        self.coefs_ = [W1, W2]
        self.intercepts_ = [b1, self.staged_intercepts_[-1].copy()]
        self.steps_ = np.array(grown.steps)
        self.train_loss_ = np.array(grown.train_loss)
        self.n_iter_ = np.array(grown.iterations)
        self.n_units_ = W1.shape[1]
        # The parameters may be set anew after fitting.
        self._width = self.units_per_step
        self._sigma: Activation = self.activation
        self.validation_loss_ = np.array(grown.validation_loss)
        if grown.validation_loss:
            self._cut(int(np.argmin(self.validation_loss_)) + 1)

    def _cut(self, n_blocks: int) -> None:
        """Drop all units but those of the first blocks."""
        k = n_blocks * self._width
        self.coefs_ = [self.coefs_[0][:, :k].copy(), self.coefs_[1][:k].copy()]
        self.staged_intercepts_ = self.staged_intercepts_[: n_blocks + 1].copy()
        self.intercepts_ = [self.intercepts_[0][:k].copy(), self.staged_intercepts_[-1].copy()]
        self.steps_, self.n_iter_ = self.steps_[:n_blocks].copy(), self.n_iter_[:n_blocks].copy()
        self.train_loss_ = self.train_loss_[: n_blocks + 1].copy()
        self.n_units_ = k

    def _n_blocks(self, n_units: int | None) -> int:
        """How many blocks make so many units."""
        check_is_fitted(self)
        if n_units is None:
            return self.n_units_ // self._width
        check_scalar(n_units, "n_units", Integral)
        if n_units % self._width or not 0 < n_units <= self.n_units_:
            raise ValueError(
                f"expected n_units to be a multiple of units_per_step={self._width} up to {self.n_units_}, got {n_units}"
            )
        return n_units // self._width

    def _hidden(self, X: ArrayLike, n_blocks: int) -> Array:
        """Hidden activations `[N, units]` of the first blocks."""
        features: Array = _validated(self, X, dtype=np.float64, reset=False)
        k = n_blocks * self._width
        hidden = features @ self.coefs_[0][:, :k]
        hidden += self.intercepts_[0][:k]
        _activate(hidden, self._sigma)
        return hidden

    def _logits(self, X: ArrayLike, n_units: int | None) -> Array:
        """Outputs `[N, K]` of the network of the first `n_units` units."""
        n_blocks = self._n_blocks(n_units)
        hidden = self._hidden(X, n_blocks)
        return hidden @ self.coefs_[1][: hidden.shape[1]] + self.staged_intercepts_[n_blocks]

    def _staged_logits(self, X: ArrayLike) -> Iterator[Array]:
        """Outputs `[N, K]` after every block; the hidden layer is computed once."""
        n_blocks = self._n_blocks(None)
        hidden = self._hidden(X, n_blocks)
        logits = np.tile(self.staged_intercepts_[0], (len(hidden), 1))
        for t in range(n_blocks):
            block = slice(t * self._width, (t + 1) * self._width)
            shift = self.staged_intercepts_[t + 1] - self.staged_intercepts_[t]
            logits = logits + hidden[:, block] @ self.coefs_[1][block] + shift
            yield logits

    def truncate(self, n_units: int):
        """A smaller fitted estimator, of the first `n_units` units.

        Args:
            n_units: a multiple of `units_per_step`; the units trained last are dropped, and their part of the bias.

        Raises:
            ValueError: if there are not so many units, or `n_units` would cut a block in two.
        """
        n_blocks = self._n_blocks(n_units)
        smaller = copy.deepcopy(self)
        smaller._cut(n_blocks)
        return smaller

    def to_module(self, n_units: int | None = None, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The network as a module: `hidden` (linear), `activation`, `head` (linear).

        It takes raw inputs, standardisation being folded into the weights. Where features lie far from zero compared
        to their spread, that folding needs the digits of `torch.float64`.

        Args:
            n_units: of the first so many units; all by default.
            dtype: of the weights.

        Returns:
            From `[B, D]` to logits `[B, K]`: one for two classes (its sigmoid is the probability of `classes_[1]`),
            one for each of more classes, or the targets of a regression.

        Raises:
            ValueError: as `truncate`.
        """
        n_blocks = self._n_blocks(n_units)
        k = n_blocks * self._width
        W1, W2 = self.coefs_[0][:, :k], self.coefs_[1][:k]

        def linear(weight: Array, bias: Array) -> nn.Linear:
            layer = nn.Linear(*weight.shape, device="meta")  # draws no initial weights from the global generator
            layer.weight = nn.Parameter(torch.tensor(weight.T, dtype=dtype))
            layer.bias = nn.Parameter(torch.tensor(bias, dtype=dtype))
            return layer

        hidden, head = linear(W1, self.intercepts_[0][:k]), linear(W2, self.staged_intercepts_[n_blocks])
        return nn.Sequential(OrderedDict(hidden=hidden, activation=MODULES[self._sigma](), head=head))


class GBNNClassifier(ClassifierMixin, _GBNN):
    """Classify with a network of one hidden layer that is grown by gradient boosting.

    With $T$ blocks $f_t$ of $J$ hidden units each, the network computes

    $$F_T(x) = F_0 + \\sum_{t=1}^{T} \\eta \\rho_t f_t(x), \\qquad
    f_t(x) = W_{2,t}^\\top \\sigma(W_{1,t}^\\top x + b_{1,t}) + b_{2,t}.$$

    Block $t$ is fitted by least squares and L-BFGS to the residuals $r_i = -\\partial L / \\partial F(x_i)$ on a random
    part of the examples, and $\\rho_t$ is one Newton step of the loss along it. Two classes, $y = \\pm 1$:
    $L = \\log(1 + e^{-2yF})$ and the logit is $2F$. More classes: cross-entropy of $\\operatorname{softmax}(F)$, one
    output for each. The first $t$ blocks are exactly $F_t$, so any prefix of the units is a network of its own.

    Many tiny blocks with small steps do best; large blocks at $\\eta = 1$ overfit.

    Args:
        total_units: hidden units $T J$; rounded down to a multiple of `units_per_step`.
        units_per_step: units $J$ of a block.
        learning_rate: shrinkage $\\eta$ above 0.
        subsample: share in (0, 1] of the examples that each block is fitted to, drawn without replacement.
        max_iter: L-BFGS iterations for each block.
        alpha: ridge $\\alpha$ on the weights of a block, not on its biases.
        activation: `"logistic"`, `"tanh"` or `"relu"`.
        init: $F_0$: `"prior"`, the constant of least loss (the log class frequencies), or `"zero"`.
        standardize: fit on features of zero mean and unit variance; folded into the weights, so that the network
            takes raw features.
        n_iter_no_change: stop after so many blocks without a new best loss on the held-out part.
        validation_fraction: share of the examples to hold out; the network is then cut to its best prefix. `None`
            holds nothing out.
        random_state: seed, or a generator, of subsamples and initial weights.

    Attributes:
        classes_: labels, in the order of the outputs.
        coefs_: `[D, T J]` and `[T J, K]`, block $t$ in columns (rows) $tJ, \\dots, (t+1)J - 1$; $K = 1$ for two classes.
        intercepts_: `[T J]` and `[K]`.
        staged_intercepts_: `[T + 1, K]`; row $t$ is the output bias of the first $t$ blocks.
        steps_: $\\eta \\rho_t$, `[T]`.
        train_loss_: mean loss of $F_0, \\dots, F_T$ on the training examples, `[T + 1]`.
        validation_loss_: likewise on the held-out ones, for each block that was trained; empty without them.
        n_iter_: L-BFGS iterations of each block.
        n_units_: hidden units there are.

    Raises:
        ValueError: in `fit`, for parameters out of range, a single class, non-finite features, more than one label for
            an example.
        TypeError: in `fit`, for parameters of another type.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> model = GBNNClassifier(total_units=40, units_per_step=4, learning_rate=0.5, random_state=0)
        >>> model = model.fit(X[:1200], y[:1200])
        >>> model.predict(X[1200:], n_units=20).shape  # half of the network
        (597,)
        >>> model.to_module()
        Sequential(
          (hidden): Linear(in_features=64, out_features=40, bias=True)
          (activation): Sigmoid()
          (head): Linear(in_features=40, out_features=10, bias=True)
        )

    Reference:
        Emami and Martínez-Muñoz, IEEE Access 2023, algorithm 1. The authors' code starts more than two classes at
        zero (`init="zero"`) and steps at full length (`learning_rate=1`).
    """

    classes_: NDArray[Any]

    def fit(self, X: ArrayLike, y: ArrayLike):
        """Grow the network on features `[N, D]` and labels `[N]`."""
        self._check_parameters()
        features, labels = _validated(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        encoder = LabelEncoder().fit(labels)
        self.classes_ = np.asarray(encoder.classes_)
        codes = np.asarray(encoder.transform(labels))
        if len(self.classes_) < 2:
            raise ValueError(f"expected examples of at least two classes, got one class: {self.classes_[0]!r}")
        if len(self.classes_) == 2:
            loss, Y = BinaryLoss(), 2.0 * codes[:, None] - 1
        else:
            loss, Y = MulticlassLoss(), np.eye(len(self.classes_))[codes]
        self._fit(features, Y, loss, codes)
        return self

    def decision_function(self, X: ArrayLike, n_units: int | None = None) -> Array:
        """Logits: `[N]` for two classes ($2F$), else `[N, K]`. `n_units` takes the first so many units."""
        return self._scores(self._logits(X, n_units))

    def predict_proba(self, X: ArrayLike, n_units: int | None = None) -> Array:
        """Class probabilities `[N, K]`, in the order of `classes_`."""
        logits = self._logits(X, n_units)
        if logits.shape[1] == 1:
            return np.hstack([expit(-logits), expit(logits)])
        return softmax(logits, axis=1)

    def predict(self, X: ArrayLike, n_units: int | None = None) -> NDArray[Any]:
        """Labels `[N]`. `n_units` takes the first so many units, a multiple of `units_per_step`."""
        return self._labels(self._logits(X, n_units))

    def staged_decision_function(self, X: ArrayLike) -> Iterator[Array]:
        """`decision_function` after every block."""
        return (self._scores(logits) for logits in self._staged_logits(X))

    def staged_predict(self, X: ArrayLike) -> Iterator[NDArray[Any]]:
        """`predict` after every block."""
        return (self._labels(logits) for logits in self._staged_logits(X))

    def staged_score(self, X: ArrayLike, y: ArrayLike) -> Iterator[float]:
        """Accuracy after every block."""
        return (float(accuracy_score(y, labels)) for labels in self.staged_predict(X))

    def _scores(self, logits: Array) -> Array:
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def _labels(self, logits: Array) -> NDArray[Any]:
        codes = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
        return self.classes_[np.asarray(codes, dtype=np.intp)]


class GBNNRegressor(RegressorMixin, _GBNN):
    """Regress with a network of one hidden layer that is grown by gradient boosting.

    As `GBNNClassifier`, whose arguments and attributes it has, for $L = \\frac12 \\lVert y - F\\rVert^2$: $F_0$ is the
    mean target, residuals are $y - F$, and $\\rho_t = 1$. Several targets share the hidden units.

    Args:
        total_units: see `GBNNClassifier`; so are all other arguments.
        units_per_step: units of a block.
        learning_rate: shrinkage $\\eta$.
        subsample: share of the examples that each block is fitted to.
        max_iter: L-BFGS iterations for each block.
        alpha: ridge, against residuals in the units of the target.
        activation: `"logistic"`, `"tanh"` or `"relu"`.
        init: `"prior"` starts at the mean target, `"zero"` at zero.
        standardize: of the features; targets are taken as they are.
        n_iter_no_change: stop after so many blocks without a new best on the held-out part.
        validation_fraction: share of the examples to hold out.
        random_state: seed, or a generator.

    Raises:
        ValueError: in `fit`, for parameters out of range, non-finite features or targets.
        TypeError: in `fit`, for parameters of another type.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = GBNNRegressor(total_units=20, learning_rate=0.05, random_state=0).fit(X, y)
        >>> model.predict(X[:3]).shape
        (3,)

    Reference:
        Emami and Martínez-Muñoz, IEEE Access 2023, algorithm 1.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike):
        """Grow the network on features `[N, D]` and targets `[N]` or `[N, K]`."""
        self._check_parameters()
        features, targets = _validated(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True)
        Y = np.asarray(targets, dtype=np.float64)
        self._one_target = Y.ndim == 1
        self._fit(features, Y.reshape(len(Y), -1), SquaredLoss(), None)
        return self

    def predict(self, X: ArrayLike, n_units: int | None = None) -> Array:
        """Targets, `[N]` or `[N, K]` as they were in `fit`. `n_units` takes the first so many units."""
        return self._targets(self._logits(X, n_units))

    def staged_predict(self, X: ArrayLike) -> Iterator[Array]:
        """`predict` after every block."""
        return (self._targets(outputs) for outputs in self._staged_logits(X))

    def staged_score(self, X: ArrayLike, y: ArrayLike) -> Iterator[float]:
        """$R^2$ after every block."""
        return (float(r2_score(y, targets)) for targets in self.staged_predict(X))

    def _targets(self, outputs: Array) -> Array:
        return outputs[:, 0] if self._one_target else outputs


class BoostedHead(NamedTuple):
    """What `boost_head` returns.

    Attributes:
        features: of the backbone, `[N, D]`.
        estimator: fitted on them.
        network: `nn.Sequential(backbone, head)`.
    """

    features: Tensor
    estimator: GBNNClassifier | GBNNRegressor
    network: nn.Sequential


def boost_head(backbone: nn.Module, loader: Data, *, batch_size: int = 256, **parameters: Any) -> BoostedHead:
    """Replace the dense end of a deep network by a boosted one.

    The features of the backbone (a trained network cut before its final dense layers) are computed once, in evaluation
    mode and without gradients; the head is grown on them. The backbone is not changed.

    Args:
        backbone: from a batch to features `[B, ...]`, which are flattened.
        loader: batches (x, y), a data set or a pair of tensors. Floating y is regressed, other y classified.
        batch_size: of data sets and tensors.
        **parameters: of `GBNNClassifier` or `GBNNRegressor`.

    Returns:
        Features, fitted estimator, and the backbone with the head on its device and of its dtype. The network's logits
        are in the order of `estimator.classes_`; there is one for two classes.

    Example:
        >>> backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        >>> x, y = torch.randn(60, 1, 8, 8), torch.arange(60) % 3
        >>> boosted = boost_head(backbone, (x, y), total_units=8, random_state=0)
        >>> boosted.network(x).shape
        torch.Size([60, 3])
    """
    like = next(backbone.parameters(), None)
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    flat = True
    with torch.no_grad(), untouched(backbone, training=False):
        for x, y in batches(loader, batch_size, None if like is None else like.device):
            features = backbone(x)
            flat = flat and features.dim() == 2
            xs.append(flatten_features(features, "all"))
            ys.append(y)
    features, targets = torch.cat(xs), torch.cat(ys)
    kind = GBNNRegressor if targets.is_floating_point() else GBNNClassifier
    estimator = kind(**parameters).fit(features.cpu().double().numpy(), targets.cpu().numpy())
    head = estimator.to_module(dtype=features.dtype).to(features.device)
    if not flat:
        head = nn.Sequential(nn.Flatten(), *head)
    return BoostedHead(features, estimator, nn.Sequential(OrderedDict(backbone=backbone, head=head)))
