"""A block of a few hidden units, fitted by L-BFGS to what the blocks before it left to explain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

__all__ = ["Activation", "Block", "activate", "block_objective", "fit_block", "initial_block"]

Array = NDArray[np.float64]
Activation = Literal["logistic", "tanh", "relu"]


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
        activate(hidden, activation)
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
        activate(A, activation)
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
    result = minimize(objective, initial.flat(), jac=True, method="L-BFGS-B", options=options)
    return Block.views(result.x, D, J, K), int(result.nit)


def activate(Z: Array, activation: Activation) -> None:
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
