"""Double descent of random features and of any other model, and the part that optimisation has in it.

Chris Yuhao Liu, Jeffrey Flanigan, "Understanding the Role of Optimization in Double Descent", NeurIPS 2023 workshop M3L,
https://arxiv.org/abs/2312.03951.

The test error peaks where a model can just fit its training data if, and only if, the optimiser reaches a low training
loss there. Learning rate, number of steps, batch size, algorithm, initialisation, and normalisation act through the
conditioning of the problem and the loss that is reached. This module sweeps them:

- `gradient_descent_path` gives gradient descent on fixed features at any number of steps in closed form;
- `train_nested` trains the readouts of many numbers of features at once by any optimiser and batch size;
- `RandomFeatureRegressor` is the model as a scikit-learn estimator;
- `capacity_sweep` runs somebody's own models, `peak` measures the height of a peak, `compare` puts it beside the training
  loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn

from torchfolio.checks import at_least, one_of, positive, whole
from torchfolio.insight.capacity import Peak, SweepResult, capacity_sweep, compare, peak, plot_comparison
from torchfolio.insight.gradient_path import Decomposition, Path, gradient_descent_path

__all__ = [
    "Decomposition",
    "Path",
    "Peak",
    "RandomFeatureRegressor",
    "RandomFeatures",
    "SweepResult",
    "capacity_sweep",
    "compare",
    "gradient_descent_path",
    "peak",
    "plot_comparison",
    "sgd_rate",
    "train_nested",
]

Activation = Callable[[Tensor], Tensor]


class RandomFeatures(nn.Module):
    """Frozen random features $\\phi(s \\, x W_0)$ with $W_0 \\sim N(0, 1/D)$.

    Args:
        in_features: number of inputs D.
        out_features: number of features P.
        activation: elementwise $\\phi$.
        scale: factor s of the inputs.
        generator: CPU generator to draw with; torch's global one by default.
        dtype: type of the weights.

    Shapes:
        `[..., D]` to `[..., P]`.

    Raises:
        ValueError: if a size is below 1 or `scale` is not positive.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation = torch.tanh,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (whole("in_features", in_features, 1), whole("out_features", out_features, 1))
        self.activation, self.scale = activation, positive("scale", scale)
        drawn = torch.randn(shape, generator=generator, dtype=dtype) / math.sqrt(in_features)
        self.register_buffer("weight", drawn)

    def first(self, count: int) -> RandomFeatures:
        """The map of the first features, so that neighbouring capacities are paired; it shares its weights."""
        nested = RandomFeatures(len(self.weight), 1, self.activation, self.scale, torch.Generator())
        nested.weight = self.weight[:, : whole("count", count, 1, self.weight.shape[1])]
        return nested

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.scale * x @ self.weight)

    def extra_repr(self) -> str:
        return f"in_features={len(self.weight)}, out_features={self.weight.shape[1]}, scale={self.scale:g}"


def sgd_rate(Z: Tensor, batch_size: int) -> float:
    """Half the learning rate from which on SGD on batches of features `[N, P]` diverges.

    $b / (\\beta + (b - 1) \\lambda_1)$ with $\\beta = \\max_i \\|z_i\\|^2$ and $\\lambda_1 = \\sigma_1^2 / N$; for a batch of all
    samples $1 / \\lambda_1$ (nearly), the default of `gradient_descent_path`.

    Reference:
        Ma, Bassily, Belkin, "The Power of Interpolation", ICML 2018, theorem 1.
    """
    largest = float(torch.linalg.matrix_norm(Z.double(), 2)) ** 2 / len(Z)
    if batch_size >= len(Z):
        return 1 / largest
    return batch_size / (float(Z.double().square().sum(1).max()) + (batch_size - 1) * largest)


def train_nested(
    Z: Tensor,
    Y: Tensor,
    sizes: Sequence[int],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    epochs: int,
    batch_size: int | None = None,
    rates: Sequence[float] | None = None,
    init_scale: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Train the linear readouts of the first P features for several P at once.

    Args:
        Z: features `[N, P_max]`.
        Y: targets `[N, K]`.
        sizes: numbers of features P.
        optimizer: makes an optimizer of a list of parameters, for example `partial(torch.optim.Adam, lr=1e-2)`.
        epochs: passes over the data, at least 1.
        batch_size: number of samples in a batch; all by default.
        rates: factor of the gradient for each size; with an SGD optimizer of `lr=1` its learning rate.
        init_scale: $\\omega$ of initial weights $\\omega / \\sqrt P \\; N(0, 1)$.
        generator: CPU generator of initial weights and order; torch's global one by default.

    Returns:
        Weights `[sizes, P_max, K]`, which are 0 beyond each size.

    Raises:
        ValueError: if sizes are out of range, a count is below 1, or training diverged.
    """
    n, widest = Z.shape
    for size in sizes:
        whole("sizes", size, 1, widest)
    whole("epochs", epochs, 1)
    batch = min(n, whole("batch_size", n if batch_size is None else batch_size, 1))
    mask = (torch.arange(widest)[:, None] < torch.tensor(list(sizes))).to(Z)[:, :, None]
    scale = init_scale / torch.tensor(list(sizes)).to(Z).sqrt()[:, None]
    drawn = torch.randn(widest, 1, Y.shape[1], generator=generator).to(Z)
    weight = (drawn * scale * mask).contiguous()
    factor = mask * (1.0 if rates is None else torch.tensor(list(rates), dtype=Z.dtype, device=Z.device)[:, None])
    steps = optimizer([weight])
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator).to(Z.device) if batch < n else torch.arange(n, device=Z.device)
        for rows in order.split(batch):
            z = Z[rows]
            # One product for all sizes, since they share their features.
            residual = (z @ weight.flatten(1)).view(len(rows), *weight.shape[1:]) - Y[rows, None]
            weight.grad = (z.T @ residual.flatten(1)).view_as(weight) * (factor / len(rows))
            steps.step()
    weight = weight.detach()
    if not torch.isfinite(weight).all():
        raise ValueError("training diverged, expected a smaller learning rate")
    return weight.transpose(0, 1)


Solver = Literal["lstsq", "gd", "heavy_ball", "sgd", "adam"]
_ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu, "erf": torch.erf, "cos": torch.cos}


class RandomFeatureRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Linear regression on random features, by a solver whose part in double descent can be seen.

    Targets are centred, since the features have no bias.

    Args:
        n_features: number of random features.
        activation: `"tanh"`, `"relu"`, `"erf"`, `"cos"`, or an elementwise function of tensors.
        solver: `"lstsq"`, the interpolator of least norm; `"gd"` and `"heavy_ball"` (momentum 0.9), in closed form;
            `"sgd"` or `"adam"`, by iteration.
        n_steps: number of steps of `"gd"` and `"heavy_ball"`, of epochs of `"sgd"` and `"adam"`.
        learning_rate: learning rate; by default half of where descent on a batch diverges, and 0.01 for `"adam"`.
        batch_size: number of samples in a batch of `"sgd"` and `"adam"`; all by default.
        init_scale: $\\omega$ of initial weights $\\omega / \\sqrt P \\; N(0, 1)$.
        normalize: whether inputs are standardised.
        random_state: seed of features, initial weights and order.

    Attributes:
        weights_: readout weights `[P, outputs]`.
        features_: random features, a module.
        train_loss_: mean squared error on the training data.
        condition_number_: condition number of the features of the training data.
    """

    def __init__(
        self,
        n_features: int = 100,
        *,
        activation: str | Activation = "tanh",
        solver: Solver = "lstsq",
        n_steps: int = 1000,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        init_scale: float = 0.0,
        normalize: bool = True,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_features = n_features
        self.activation = activation
        self.solver = solver
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.init_scale = init_scale
        self.normalize = normalize
        self.random_state = random_state

    def fit(self, X, y) -> RandomFeatureRegressor:
        """Draw features and train the readout on samples `[N, D]` and targets `[N]` or `[N, outputs]`."""
        self._check_parameters()
        checked: Any = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        X, y = checked
        self._single = y.ndim == 1
        targets = torch.from_numpy(np.asarray(y, dtype=np.float64).reshape(len(y), -1))
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        self._mean, self._target_mean = X.mean(0), targets.mean(0)
        spread = X.std(0)
        self._std = np.where(spread > 0, spread, 1.0)
        activation = _ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        self.features_ = RandomFeatures(X.shape[1], self.n_features, activation, 1.0, generator, torch.float64)
        Z, Y = self._features(X), targets - self._target_mean
        problem = Decomposition(Z, Y)
        self.condition_number_ = problem.condition_number
        self.weights_ = self._solve(problem, generator).numpy()
        self.train_loss_ = float((Z @ torch.from_numpy(self.weights_) - Y).square().mean())
        return self

    def _check_parameters(self) -> None:
        whole("n_features", self.n_features, 1)
        whole("n_steps", self.n_steps, 1)
        one_of("solver", self.solver, get_args(Solver))
        if isinstance(self.activation, str):
            one_of("activation", self.activation, _ACTIVATIONS)
        if self.learning_rate is not None:
            positive("learning_rate", self.learning_rate)
        if self.batch_size is not None:
            whole("batch_size", self.batch_size, 1)
        at_least("init_scale", self.init_scale, 0)

    def _features(self, X: np.ndarray) -> Tensor:
        X = (X - self._mean) / self._std if self.normalize else X
        return self.features_(torch.from_numpy(np.ascontiguousarray(X)))

    def _solve(self, problem: Decomposition, generator: torch.Generator) -> Tensor:
        Z, Y, rate = problem.Z, problem.Y, self.learning_rate
        if self.solver in ("sgd", "adam"):
            batch = len(Z) if self.batch_size is None else self.batch_size
            lr = (0.01 if self.solver == "adam" else sgd_rate(Z, batch)) if rate is None else rate
            kind = torch.optim.Adam if self.solver == "adam" else torch.optim.SGD
            own = {"epochs": self.n_steps, "batch_size": batch, "init_scale": self.init_scale, "generator": generator}
            return train_nested(Z, Y, [self.n_features], lambda parameters: kind(parameters, lr=lr), **own)[0]
        init = (
            self.init_scale / math.sqrt(self.n_features) * torch.randn(self.n_features, Y.shape[1], generator=generator)
        )
        steps = math.inf if self.solver == "lstsq" else self.n_steps
        momentum = 0.9 if self.solver == "heavy_ball" else 0.0
        return problem.path(steps, lr=None if self.solver == "lstsq" else rate, momentum=momentum, init=init).weights(
            steps
        )

    def predict(self, X) -> np.ndarray:
        """Predictions for samples `[N, D]`."""
        check_is_fitted(self)
        checked: Any = validate_data(self, X, dtype=np.float64, reset=False)
        output = self._features(checked) @ torch.from_numpy(self.weights_) + self._target_mean
        return output[:, 0].numpy() if self._single else output.numpy()
