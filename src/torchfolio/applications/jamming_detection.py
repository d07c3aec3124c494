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
from torch.nn import functional as F

from torchfolio.applications import nr
from torchfolio.applications.jamming_features import EPNREDetector, SSBFeatures, epnre
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
from torchfolio.engine import EarlyStopping, LearningRule, fit, seeded
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

BANDS = ((15.0, 20.0), (20.0, 25.0), (25.0, 30.0))
FEWEST = 50  # ambiguous examples below which a second network learns nothing
_validated: Any = validate_data  # scikit-learn's defaults for X and y are strings, which misleads type checkers


def select_thresholds(
    p: Any, y: Any, epsilon: float = 0.01, fallback: tuple[float, float] = (0.1, 0.9)
) -> tuple[float, float]:
    """The pair of thresholds between which as little as possible is left undecided.

    $\\theta_H$ is the smallest value with $P(\\text{clean} \\mid p \\ge \\theta_H) \\le \\epsilon$, $\\theta_L$ the largest with
    $P(\\text{jammed} \\mid p \\le \\theta_L) \\le \\epsilon$. Where there is no such pair with $\\theta_L < \\theta_H$, $\\epsilon$ is
    widened by 1.5, at most three times, and then the fallback is taken.

    Args:
        p: probabilities of a jammer by networks that did not see the examples, `[N]`.
        y: labels, `[N]`.
        epsilon: $\\epsilon$, share of errors that is allowed on either side.
        fallback: pair for when there is none.
    """
    p, y = np.asarray(p, dtype=float), np.asarray(y)
    order = np.argsort(p)
    values, jammed = p[order], y[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # ties are decided together
    below = np.cumsum(jammed)[last] / (last + 1)
    first = np.append(0, last[:-1] + 1)
    above = (np.cumsum((1 - jammed)[::-1])[::-1])[first] / (len(p) - first)
    for k in range(4):
        low, high = (np.flatnonzero(error <= epsilon * 1.5**k) for error in (below, above))
        if len(low) and len(high):
            pair = float(values[last[low[-1]]]), float(values[first[high[0]]])
            if pair[0] < pair[1]:
                return pair
    return fallback


class DoubleThreshold(nn.Module):
    """The detector as a network, from features to a score above 0.5 where there is a jammer.

    Args:
        first: from standardised features to the logit of $p_1$, a linear layer last.
        scale: mean and standard deviation of the features, `[2, F]`.
        thresholds: $\\theta_L$ and $\\theta_H$.
        second: hidden layers and head of the second network; none for a detector with a single threshold of 0.5.
        second_scale: mean and standard deviation of its inputs.
        final: threshold on $p_2$.

    Shapes:
        `[N, F]` to scores `[N]` in [0, 1]: $p_1$ where it decides, a value between the thresholds elsewhere.
    """

    scale: Tensor
    thresholds: Tensor
    second_scale: Tensor

    def __init__(
        self,
        first: nn.Sequential,
        scale: Tensor,
        thresholds: tuple[float, float] = (0.5, 0.5),
        second: nn.Sequential | None = None,
        second_scale: Tensor | None = None,
        final: float = 0.5,
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("scale", scale)
        self.register_buffer("thresholds", torch.tensor([*thresholds, final], dtype=torch.float64))
        self.register_buffer("second_scale", torch.zeros(2, 0) if second_scale is None else second_scale)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the second network without their logit, `[N, F + H]`, and the first one's logits `[N]`."""
        z = (x - self.scale[0]) / self.scale[1]
        h = self.first[:-1](z)
        return torch.cat([z, h], 1), self.first[-1](h)[:, 0]

    def probabilities(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """$p_1$ and $p_2$ of every example, in float64."""
        z, logit = self.hidden(x)
        p1 = logit.double().sigmoid()
        if self.second is None:
            return p1, None
        z = torch.cat([z, logit[:, None]], 1)
        return p1, self.second((z - self.second_scale[0]) / self.second_scale[1])[:, 0].double().sigmoid()

    def stage(self, x: Tensor) -> Tensor:
        """Which network decides, 1 or 2, `[N]`."""
        return 1 + self._ambiguous(self.probabilities(x)[0]).long()

    def _ambiguous(self, p1: Tensor) -> Tensor:
        low, high, _ = self.thresholds
        return (p1 > low) & (p1 < high) if self.second is not None else torch.zeros_like(p1, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        p1, p2 = self.probabilities(x)
        if p2 is None:
            return p1
        low, high, final = self.thresholds
        # Scores rise with what either network says, and 0.5 is where the decision turns.
        bottom, top = low.clamp_max(0.5), high.clamp_min(0.5)
        tiny = torch.finfo(torch.float64).tiny
        sure = torch.where(
            p1 <= low, p1 * bottom / low.clamp_min(tiny), top + (1 - top) * (p1 - high) / (1 - high + tiny)
        )
        under = bottom + (0.5 - bottom) * p2 / final
        over = 0.5 + (top - 0.5) * (p2 - final) / (1 - final + tiny)
        return torch.where(self._ambiguous(p1), torch.where(p2 < final, under, over), sure)


class DTDDNN(ClassifierMixin, BaseEstimator):
    """The double-threshold deep learner as a scikit-learn classifier of feature tables.

    Args:
        hidden: widths of the first network's hidden layers.
        stages: widths of the cascade's layers, each trained with a head of its own and then frozen.
        epsilon: share of errors that is allowed on either side of the thresholds.
        thresholds: fixed pair $(\\theta_L, \\theta_H)$ in place of the selected one; (0.5, 0.5) leaves the first network alone.
        folds: number of parts for predictions out of fold.
        learning_rate: of Adam.
        weight_decay: of the first network.
        epochs: number of passes for the first network.
        stage_epochs: maximum number of passes for a layer of the cascade.
        patience: number of passes without a gain that are waited for there.
        batch_size: number of examples of a step.
        device: where to compute.
        random_state: seed or generator of folds, weights and order.

    Attributes:
        classes_: the two labels, the jammer's second.
        network_: the trained `DoubleThreshold`.
        thresholds_: the pair in use.
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
        weight = _weights(codes, sjr)
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
        fit(net, data, val=val, rule=_WeightedRule(), optimizer=adam(self.learning_rate, weight_decay=decay), epochs=epochs,
            batch_size=self.batch_size, seed=self._seed, device=self.device, evaluate=None if val is None else _weighted_loss,
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


class _WeightedRule(LearningRule):
    """Binary cross-entropy of examples with weights."""

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        self.model = model
        return model

    def step(self, batch: Sequence[Tensor], backward: Any) -> dict[str, Tensor]:
        loss = _loss(self.model, *batch)
        backward(loss)
        return {"loss": loss.detach()}


def _loss(model: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(x)[:, 0], y, weight)


@torch.no_grad()
def _weighted_loss(model: nn.Module, data: Any) -> dict[str, float]:
    place = next(model.parameters()).device
    tensors = data.tensors if hasattr(data, "tensors") else data
    return {"loss": float(_loss(model, *(t.to(place) for t in tensors)))}


def _weights(codes: np.ndarray, sjr: Any) -> Tensor:
    """Mean 1, both labels of equal weight; jammed examples by the rarity of their band."""
    weight = np.ones(len(codes))
    if sjr is not None:
        sjr = np.asarray(sjr, dtype=float)
        if sjr.shape != codes.shape:
            raise ValueError(f"expected a ratio for each of {len(codes)} examples, got shape {sjr.shape}")
        jammed = codes == 1
        if not np.isfinite(sjr[jammed]).all():
            raise ValueError("expected finite ratios of jammed examples")
        _, band, count = np.unique(sjr[jammed] // 5, return_inverse=True, return_counts=True)
        weight[jammed] = 1 / count[band]
    for code in (0, 1):
        weight[codes == code] *= len(codes) / 2 / weight[codes == code].sum()
    return torch.from_numpy(weight).float()


def detection_report(
    model: Any, X: Any, y: Any, sjr: Any, snr_db: float | None = None, bands: Sequence[tuple[float, float]] = BANDS
) -> Any:
    """How well a detector does by the jammer's weakness, beside the best energy detector.

    Args:
        model: fitted classifier with `predict`; a `DTDDNN` also says how often its second network decides.
        X: features `[N, F]`.
        y: 1 where there is a jammer, `[N]`.
        sjr: signal to jammer ratios in dB, `[N]`.
        snr_db: signal to noise ratio; with it the table has the detection rate of an `EPNREDetector` that knows it, at the
            same false alarm rate.
        bands: ranges of the ratio, in dB.

    Returns:
        A DataFrame, a row for each band and one for clean captures: number, detection or false alarm rate, accuracy, share
        that the second network decided, bound.

    Raises:
        ValueError: if there are no clean captures.
    """
    import pandas as pd

    y, sjr = np.asarray(y), np.asarray(sjr, dtype=float)
    alarm = np.asarray(model.predict(X)) == np.max(getattr(model, "classes_", 1))
    stage = model.decision_path(X) if isinstance(model, DTDDNN) else np.ones(len(y))
    if not (y == 0).any():
        raise ValueError("expected some clean captures, to have a false alarm rate")
    pfa = float(alarm[y == 0].mean())
    rows = {}
    for low, high in bands:
        inside = (y == 1) & (sjr >= low) & ((sjr < high) | ((sjr == high) & (high == bands[-1][1])))
        bound = np.nan
        if snr_db is not None and inside.any() and 0 < pfa < 1:
            bound = float(EPNREDetector(pfa).power(10 ** (-snr_db / 10), 10 ** (-sjr[inside] / 10)).mean())
        rate = float(alarm[inside].mean()) if inside.any() else np.nan
        rows[f"{low:g} to {high:g} dB"] = (int(inside.sum()), rate, rate, _mean(stage[inside] == 2), bound)
    clean = y == 0
    rows["clean"] = (int(clean.sum()), pfa, 1 - pfa, _mean(stage[clean] == 2), np.nan)
    columns = ["n", "alarms", "accuracy", "second_stage", "energy_bound"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _mean(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else np.nan
