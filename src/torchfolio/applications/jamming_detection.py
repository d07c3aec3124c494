"""Jammers found in raw samples of a 5G cell's synchronisation block: a double-threshold deep learner.

A first network gives $p_1$ from features of the block. At or above $\\theta_H$ there is a jammer, at or below $\\theta_L$ there
is none; what lies between goes to a second network that was trained on such cases alone, layer by layer as a cascade,
on the features, the first network's last hidden layer and its logit. Which cases are ambiguous is said by networks
that did not see them (out of fold): on its own training data the first network is too sure of itself.

Reference:
    Asemian et al., Over-The-Air Double-Threshold Deep Learner for Jamming Detection in 5G RF Domain, 2024
    (arXiv 2403.02645), Sections IV and V; Marquez, Hare, Niranjan, Deep Cascade Learning, IEEE TNNLS 2018.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchfolio.applications import nr
from torchfolio.applications.double_threshold import DoubleThreshold, select_thresholds
from torchfolio.applications.jamming_features import EPNREDetector, SSBFeatures, epnre
from torchfolio.applications.jamming_report import detection_report
from torchfolio.applications.jamming_signals import (
    Barrage,
    Channel,
    PartialBand,
    Pulsed,
    Spoofing,
    SSBDataset,
    Tones,
    read_iq,
    simulate,
)
from torchfolio.applications.weighted_examples import WeightedRule, detector_weights, weighted_loss
from torchfolio.engine import EarlyStopping, fit, seeded
from torchfolio.engine.recipes import adam

__all__ = [
    "DTDDNN",
    "Barrage",
    "Channel",
    "DoubleThreshold",
    "EPNREDetector",
    "PartialBand",
    "Pulsed",
    "SSBDataset",
    "SSBFeatures",
    "Spoofing",
    "Tones",
    "detection_report",
    "epnre",
    "nr",
    "read_iq",
    "select_thresholds",
    "simulate",
]  # fmt: skip

FEWEST = 50  # ambiguous examples below which a second network learns nothing
_validated: Any = validate_data  # scikit-learn's defaults for X and y are strings, which misleads type checkers


class DTDDNN(ClassifierMixin, BaseEstimator):
    """The double-threshold deep learner as a scikit-learn classifier of feature tables.

    Args:
        hidden: widths of the first network's hidden layers.
        stages: widths of the cascade's layers, each trained with a head of its own and then frozen.
        epsilon: share of errors that is allowed on either side of the thresholds.
        thresholds: fixed pair $(\\theta_L, \\theta_H)$ in place of the selected one; (0.5, 0.5) leaves the first network alone.
        folds: number of parts for predictions out of fold.
        learning_rate: learning rate of Adam.
        weight_decay: weight decay of the first network.
        epochs: number of passes for the first network.
        stage_epochs: maximum number of passes for a layer of the cascade.
        patience: number of passes without a gain that are waited for there.
        batch_size: number of examples of a step.
        device: device to compute on.
        random_state: seed or generator of folds, weights and order.

    Attributes:
        classes_: two labels, the jammer's second.
        network_: trained `DoubleThreshold`.
        thresholds_: pair in use.
        out_of_fold_: $p_1$ of the training examples by networks that did not see them, `[N]`.
        n_ambiguous_: number of training examples between the thresholds.
        n_features_in_: number of features.

    Reference:
        Asemian et al. 2024, Section V.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "hidden": ["array-like"], "stages": ["array-like"],
        "epsilon": [Interval(Real, 0, 1, closed="neither")], "thresholds": ["array-like", None],
        "folds": [Interval(Integral, 2, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "epochs": [Interval(Integral, 1, None, closed="left")],
        "stage_epochs": [Interval(Integral, 1, None, closed="left")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")], "device": [str], "random_state": ["random_state"],
    }  # fmt: skip

    def __init__(
        self,
        hidden: Sequence[int] = (64, 32),
        stages: Sequence[int] = (64, 32, 16),
        epsilon: float = 0.01,
        thresholds: tuple[float, float] | None = None,
        folds: int = 5,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        epochs: int = 40,
        stage_epochs: int = 60,
        patience: int = 5,
        batch_size: int = 128,
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.stages = stages
        self.epsilon = epsilon
        self.thresholds = thresholds
        self.folds = folds
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.stage_epochs = stage_epochs
        self.patience = patience
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sjr: Any = None) -> DTDDNN:
        """Learn from features and two labels.

        Args:
            X: features `[N, F]`.
            y: labels `[N]`; the larger one is the jammer's.
            sjr: signal to jammer ratios in dB `[N]`: jammed examples then weigh by the rarity of their 5 dB band.

        Raises:
            ValueError: if there are not exactly two labels, or a setting is out of range.
        """
        self._validate_params()  # pyright: ignore[reportAttributeAccessIssue]
        X, y = _validated(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(
                f"Only binary classification is supported: expected 2 classes, got {len(self.classes_)} class"
                + ("es" if len(self.classes_) > 1 else "")
            )
        pair = self._pair()
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        x, target = torch.from_numpy(X.astype(np.float32)), torch.from_numpy(codes).float()
        weight = detector_weights(codes, sjr)
        scale = torch.stack([x.mean(0), x.std(0, correction=0).clamp_min(1e-6)])
        self.network_ = DoubleThreshold(self._first((x - scale[0]) / scale[1], target, weight), scale)
        if pair == (0.5, 0.5):
            self.thresholds_, self.n_ambiguous_ = pair, 0
            return self
        self.out_of_fold_, inputs = self._out_of_fold(x, target, weight)
        self.thresholds_ = select_thresholds(self.out_of_fold_, codes, self.epsilon) if pair is None else pair
        low, high = self.thresholds_
        unclear = torch.from_numpy((self.out_of_fold_ > low) & (self.out_of_fold_ < high))
        self.n_ambiguous_ = int(unclear.sum())
        least = int(target[unclear].unique(return_counts=True)[1].min()) if self.n_ambiguous_ else 0
        if self.n_ambiguous_ < FEWEST or len(target[unclear].unique()) < 2 or least < 2:
            warnings.warn(
                f"{self.n_ambiguous_} ambiguous training examples are too few for a second network (at least {FEWEST} of "
                "both kinds): this detector has a single threshold",
                stacklevel=2,
            )
            return self
        self._second(inputs[unclear], target[unclear], weight[unclear], (low, high))
        return self

    def _pair(self) -> tuple[float, float] | None:
        if self.thresholds is None:
            return None
        low, high = (float(t) for t in self.thresholds)
        if not 0 < low <= high < 1:
            raise ValueError(f"expected thresholds 0 < low <= high < 1, got {tuple(self.thresholds)}")
        return low, high

    def _first(self, z: Tensor, y: Tensor, weight: Tensor) -> nn.Sequential:
        with seeded(self._seed):
            sizes = [z.shape[1], *self.hidden]
            layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
            net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        return self._train(net, (z, y, weight), None, self.epochs, self.weight_decay)

    def _out_of_fold(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[np.ndarray, Tensor]:
        """Probabilities and the second network's inputs, each from a first network that did not see the example.

        All start from the same weights, so that their hidden units mean the same; those of a network's own training
        examples would give their labels away.
        """
        least = int(min(y.sum(), (1 - y).sum()))
        if least < 2:
            raise ValueError(f"expected at least 2 examples of each label, got {least}")
        inputs = torch.zeros(len(x), x.shape[1] + [x.shape[1], *self.hidden][-1] + 1)
        parts = StratifiedKFold(min(self.folds, least), shuffle=True, random_state=self._seed).split(x, y)
        for train, held in parts:
            scale = torch.stack([x[train].mean(0), x[train].std(0, correction=0).clamp_min(1e-6)])
            first = self._first((x[train] - scale[0]) / scale[1], y[train], weight[train])
            with torch.no_grad():
                z, logit = DoubleThreshold(first, scale).hidden(x[held])
                inputs[held] = torch.cat([z, logit[:, None]], 1)
        return inputs[:, -1].double().sigmoid().numpy(), inputs

    def _second(self, z: Tensor, y: Tensor, weight: Tensor, pair: tuple[float, float]) -> None:
        """Deep cascade learning on the ambiguous examples."""
        net, logit = self.network_, z[:, -1].numpy()
        scale = torch.stack([z.mean(0), z.std(0, correction=0).clamp_min(1e-6)])
        z = (z - scale[0]) / scale[1]
        split: Any = train_test_split(np.arange(len(z)), test_size=0.2, random_state=self._seed, stratify=y.numpy())
        train, held = split
        layers: list[nn.Module] = []
        for k, width in enumerate(self.stages):
            with seeded(self._seed + 100 + k):
                stage = nn.Sequential(nn.Linear(z.shape[1], width), nn.ReLU(), nn.Linear(width, 1))
            data, val = ((z[part], y[part], weight[part]) for part in (train, held))
            self._train(stage, data, val, self.stage_epochs, 0.0)
            layers += [stage[0], nn.ReLU()]
            with torch.no_grad():
                z = stage[:2](z)
            if k + 1 == len(self.stages):
                layers.append(stage[2])
        second = nn.Sequential(*layers)
        with torch.no_grad():
            p2 = second[-1](z)[:, 0].double().sigmoid().numpy()
        # As many false alarms as the first network has at 0.5, among examples that no layer was trained on.
        clean = held[y.numpy()[held] == 0]
        rate = float((logit[clean] >= 0).mean())
        final = float(np.clip(np.quantile(p2[clean], 1 - rate), 0.01, 0.99))
        self.network_ = DoubleThreshold(net.first, net.scale, pair, second, scale, final)

    def _train(self, net: nn.Sequential, data: Any, val: Any, epochs: int, decay: float) -> nn.Sequential:
        stopping = None if val is None else EarlyStopping("val_loss", self.patience, restore_best=True)
        fit(net, data, val=val, rule=WeightedRule(), optimizer=adam(self.learning_rate, weight_decay=decay), epochs=epochs,
            batch_size=self.batch_size, seed=self._seed, device=self.device, evaluate=None if val is None else weighted_loss,
            early_stopping=stopping, progress=False)  # fmt: skip
        return net.requires_grad_(False).cpu().eval()

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(_validated(self, X, reset=False, dtype=np.float64).astype(np.float32))

    @torch.no_grad()
    def _score(self, X: Any) -> np.ndarray:
        x = self._inputs(X)
        return self.network_(x).numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores from -0.5 to 0.5, above 0 for a jammer, `[N]`."""
        return self._score(X) - 0.5

    def predict_proba(self, X: Any) -> np.ndarray:
        """Scores of both labels, `[N, 2]`: $p_1$ where it decides, and a value between the thresholds elsewhere."""
        score = self._score(X)
        return np.stack([1 - score, score], 1)

    def predict(self, X: Any) -> np.ndarray:
        """Labels `[N]`."""
        alarm = self._score(X) >= 0.5
        return self.classes_[alarm.astype(int)]

    @torch.no_grad()
    def decision_path(self, X: Any) -> np.ndarray:
        """Which network decided, 1 or 2, `[N]`."""
        x = self._inputs(X)
        return self.network_.stage(x).numpy()

    def to_module(self) -> DoubleThreshold:
        """The detector as a network, from features in float32 to scores."""
        check_is_fitted(self)
        return self.network_

    def __sklearn_tags__(self) -> Any:
        tags: Any = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
