"""What the boosted estimators share: the loop that grows blocks, and the one network that they are joined into."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from torchfolio.checks import finite
from torchfolio.efficiency.boosted_block import Activation, Block, activate, fit_block, initial_block
from torchfolio.efficiency.boosting_losses import Loss

__all__ = ["BoostedNetwork", "validated"]

Array = NDArray[np.float64]

validated: Any = validate_data  # scikit-learn's defaults for X and y are strings, which misleads type checkers

MODULES: dict[str, type[nn.Module]] = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


GRID = 2.0**24
"""Steps into which a standard deviation is divided, as single precision divides 1."""


def _on_grid(values: Array) -> Array:
    """Standardised values without their last digits.

    Those depend on the unit that the values came in, and a long descent through flat valleys multiplies any difference until
    it ends in another minimum. Where they are cut off, metres and feet give the same network to the last digit.
    """
    return np.round(values * GRID) / GRID


class _Grown(NamedTuple):
    """The result of boosting; blocks give their part in multiples of `unit`."""

    start: Array
    unit: Array
    blocks: list[Block]
    steps: list[float]
    iterations: list[int]
    train_loss: list[float]
    validation_loss: list[float]


class BoostedNetwork(BaseEstimator):
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
        check_scalar(self.alpha, "alpha", Real, min_val=0, include_boundaries="neither")
        for name in ("learning_rate", "subsample", "alpha"):  # NaN and infinity pass `check_scalar`
            finite(name, getattr(self, name))
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
            X = _on_grid((X - mean) / scale)
            held = held and (_on_grid((held[0] - mean) / scale), held[1])
        grown = self._grow(np.ascontiguousarray(X), Y, loss, rng, held)
        self._assemble(grown, loss, mean, scale)

    def _grow(self, Z: Array, Y: Array, loss: Loss, rng: RandomState, held: tuple[Array, Array] | None) -> _Grown:
        """The boosting loop: residuals, a block fitted to them, a step along it."""
        start = loss.start(Y) if self.init == "prior" else np.zeros(Y.shape[1])
        zero, unit = loss.frame(Y, start)
        grown = _Grown(start, unit, [], [], [], [], [])
        Y, F = _on_grid((Y - zero) / unit), np.tile((start - zero) / unit, (len(Y), 1))
        held = held and (held[0], (held[1] - zero) / unit)
        F_held = None if held is None else np.tile(F[0], (len(held[1]), 1))
        grown.train_loss.append(loss.value(unit * Y, unit * F))
        n_rows = max(1, int(self.subsample * len(Z)))
        for _ in range(self.total_units // self.units_per_step):
            R, rows = loss.residual(Y, F), slice(None)
            if n_rows < len(Z):
                rows = rng.permutation(len(Z))[:n_rows]
            initial = initial_block(rng, Z.shape[1], self.units_per_step, Y.shape[1], self.activation)
            if loss.blank:
                initial = initial._replace(W2=np.zeros_like(initial.W2), b2=np.zeros_like(initial.b2))
            settings = {"alpha": self.alpha, "max_iter": self.max_iter, "activation": self.activation}
            block, iterations = fit_block(Z[rows], R[rows], initial, **settings)
            f = block(Z, self.activation)
            rho = loss.step(Y, F, f)
            if rho is None and grown.blocks:
                break
            step = self.learning_rate * (rho or 0.0)  # without any curvature the constant is all there is
            F += step * f
            grown.blocks.append(block)
            grown.steps.append(step)
            grown.iterations.append(iterations)
            grown.train_loss.append(loss.value(unit * Y, unit * F))
            if held is not None and F_held is not None:
                F_held += step * block(held[0], self.activation)
                grown.validation_loss.append(loss.value(unit * held[1], unit * F_held))
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
        blocks, m, unit = grown.blocks, loss.factor, grown.unit
        W1 = np.hstack([b.W1 for b in blocks]) / scale[:, None]
        b1 = np.hstack([b.b1 for b in blocks]) - mean @ W1
        W2 = np.vstack([m * step * b.W2 * unit for b, step in zip(blocks, grown.steps, strict=True)])
        shifts = [m * grown.start, *[m * step * b.b2 * unit for b, step in zip(blocks, grown.steps, strict=True)]]
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
        features: Array = validated(self, X, dtype=np.float64, reset=False)
        k = n_blocks * self._width
        hidden = features @ self.coefs_[0][:, :k]
        hidden += self.intercepts_[0][:k]
        activate(hidden, self._sigma)
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
            n_units: number of units, the first ones; all by default.
            dtype: dtype of the weights.

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
