"""Features of several networks for estimators of scikit-learn.

Jianyu Zhang, Léon Bottou, "Learning useful representations for shifting tasks and distributions", ICML 2023,
https://arxiv.org/abs/2212.07346.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import nn

from torchfolio.checks import whole
from torchfolio.measure import outputs
from torchfolio.training.concatenation import Concatenated

__all__ = ["RichFeatures"]


class RichFeatures(TransformerMixin, BaseEstimator):
    """The concatenation as a scikit-learn transformer, to put before any estimator.

    Args:
        trunks: networks to features `[B, d_i]`.
        shape: shape of one input, into which the rows of X are folded; `None` keeps them as they are.
        normalize: whether to scale every block to unit length.
        batch_size: examples at a time.

    Attributes:
        n_features_in_: columns of X.
        feature_dims_: $d_i$.

    Shapes:
        X `[N, columns]` to `[N, d_1 + … + d_n]`.

    Raises:
        ValueError: on no trunk, other columns than were fitted, or a shape that does not hold them.

    Example:
        >>> make_pipeline(RichFeatures(trunks, shape=(1, 8, 8)), StandardScaler(), LogisticRegression()).fit(X, y)
    """

    def __init__(
        self,
        trunks: Sequence[nn.Module] = (),
        *,
        shape: tuple[int, ...] | None = None,
        normalize: bool = False,
        batch_size: int = 512,
    ) -> None:
        self.trunks, self.shape, self.normalize, self.batch_size = trunks, shape, normalize, batch_size

    def fit(self, X: Any, y: Any = None) -> RichFeatures:
        """Look at the shape of X; the trunks are trained already."""
        X = check_array(X, dtype="numeric")
        whole("batch_size", self.batch_size, 1)
        self.n_features_in_ = X.shape[1]
        self._features(X[:2])
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features of every row."""
        check_is_fitted(self)
        X = check_array(X, dtype="numeric")
        if X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but RichFeatures is expecting {self.n_features_in_} features as input"
            )
        return self._features(X)

    def _features(self, X: np.ndarray) -> np.ndarray:
        joint = Concatenated(copy.deepcopy(list(self.trunks)), normalize=self.normalize)
        weight = next((p for p in joint.parameters()), torch.zeros(()))
        x = torch.as_tensor(np.array(X), dtype=weight.dtype)
        if self.shape is not None:
            if x.shape[1] != np.prod(self.shape):
                raise ValueError(
                    f"expected rows of {np.prod(self.shape)} numbers for shape {self.shape}, got {x.shape[1]}"
                )
            x = x.view(-1, *self.shape)
        features = outputs(joint, x, batch_size=self.batch_size).numpy()
        self.feature_dims_ = joint.feature_dims
        return features

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns, `block0_0`, …."""
        check_is_fitted(self)
        return np.array([f"block{i}_{j}" for i, d in enumerate(self.feature_dims_) for j in range(d)], dtype=object)
