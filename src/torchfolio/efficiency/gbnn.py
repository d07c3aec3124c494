"""GBNN: a one-hidden-layer network grown a few units at a time by gradient boosting.

Seyedsaman Emami, Gonzalo Martínez-Muñoz, "Sequential Training of Neural Networks with Gradient Boosting", IEEE
Access 11 (2023).

For tables, or for the features of a frozen deep network. Each round fits a tiny network to what is left to explain;
all of them are joined into *one ordinary network*, so nothing is boosted at prediction time, and the units trained
last can be switched off to save time. `GBNNClassifier` and `GBNNRegressor` are scikit-learn estimators; `to_module`
makes them a `torch.nn.Module`, and `boost_head` puts one on top of a deep network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor, nn

from torchfolio.efficiency.boosted_block import Block, block_objective, fit_block, initial_block
from torchfolio.efficiency.boosted_network import BoostedNetwork, validated
from torchfolio.efficiency.boosting_losses import BinaryLoss, Loss, MulticlassLoss, SquaredLoss
from torchfolio.measure.batches import Data, batches
from torchfolio.measure.untouched import untouched
from torchfolio.models.features import flatten_features

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


class GBNNClassifier(ClassifierMixin, BoostedNetwork):
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
        alpha: ridge $\\alpha$ above 0 on the weights of a block, not on its biases.
        activation: `"logistic"`, `"tanh"` or `"relu"`.
        init: $F_0$: `"prior"`, the constant of least loss (the log class frequencies), or `"zero"`.
        standardize: fit on features of zero mean and unit variance, in single precision, so that their units do not
            matter; folded into the weights, so that the network takes raw features.
        n_iter_no_change: number of blocks without a new best loss on the held-out part, after which to stop.
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
        validation_loss_: loss on the held-out ones, for each block that was trained; empty without them.
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
        features, labels = validated(self, X, y, dtype=np.float64)
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


class GBNNRegressor(RegressorMixin, BoostedNetwork):
    """Regress with a network of one hidden layer that is grown by gradient boosting.

    As `GBNNClassifier`, whose arguments and attributes it has, for $L = \\frac12 \\lVert y - F\\rVert^2$: $F_0$ is the
    mean target, residuals are $y - F$, and $\\rho_t = 1$. Several targets share the hidden units.

    Args:
        total_units: number of units, see `GBNNClassifier`; so are all other arguments.
        units_per_step: units of a block.
        learning_rate: shrinkage $\\eta$.
        subsample: share of the examples that each block is fitted to.
        max_iter: L-BFGS iterations for each block.
        alpha: ridge above 0, against residuals in standard deviations of the target.
        activation: `"logistic"`, `"tanh"` or `"relu"`.
        init: `"prior"` starts at the mean target, `"zero"` at zero.
        standardize: whether to standardise the features; targets are measured in their standard deviations in any case.
        n_iter_no_change: number of blocks without a new best on the held-out part, after which to stop.
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
        features, targets = validated(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True)
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
        features: features of the backbone, `[N, D]`.
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
        backbone: network from a batch to features `[B, ...]`, which are flattened.
        loader: batches (x, y), a data set or a pair of tensors. Floating y is regressed, other y classified.
        batch_size: batch size of data sets and tensors.
        **parameters: parameters of `GBNNClassifier` or `GBNNRegressor`.

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
