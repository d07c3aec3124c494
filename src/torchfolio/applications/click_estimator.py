"""FinalMLP as a scikit-learn classifier of tables: vocabularies, a validation part, early stopping."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.applications.click_tables import TableEncoder
from torchfolio.applications.two_stream import FinalMLP
from torchfolio.engine import EarlyStopping, LearningRule, fit, seeded
from torchfolio.engine.recipes import adam

__all__ = ["ClickRule", "FinalMLPClassifier", "click_auc"]

_validated: Any = validate_data  # scikit-learn's defaults for X and y are strings, which misleads type checkers


class FinalMLPClassifier(ClassifierMixin, BaseEstimator):
    """Predict clicks from a DataFrame or a 2-D array, by `FinalMLP`.

    Columns of text, booleans and whole numbers are categories, others numbers; see `TableEncoder`. A part of the rows
    is held out; training stops when its AUC no longer rises, and the best weights are kept.

    Args:
        dim: coordinates of an embedding.
        hidden_1: widths of the first stream.
        hidden_2: widths of the second stream.
        heads: number of heads of the fusion.
        gates: whether embeddings are gated.
        gate_hidden: widths of the gates' hidden layers.
        context_1: columns on which the first stream's gates depend.
        context_2: columns on which the second stream's gates depend.
        dropout: probability of dropout in the streams.
        batch_norm: whether the streams have batch norm.
        learning_rate: learning rate of Adam.
        embedding_decay: $\\lambda$: $\\lambda/2$ times the sum of squares of all embeddings is added to the loss.
        batch_size: rows of a batch.
        max_epochs: maximum number of epochs.
        patience: epochs without a gain that are waited for.
        validation_fraction: share of the rows that is held out.
        multi: columns that hold several values, joined by `|`.
        min_count: minimum number of times that a category occurs.
        numeric: `"standardize"`, `"log"` or `"bucket"`.
        device: device to compute on.
        random_state: seed of the split, weights and order.

    Attributes:
        classes_: two labels.
        encoder_: encoder of the columns.
        network_: trained `FinalMLP`.
        validation_auc_: AUC of the best epoch.
        n_features_in_: number of columns.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "dim": [Interval(Integral, 1, None, closed="left")], "hidden_1": ["array-like"], "hidden_2": ["array-like"],
        "heads": [Interval(Integral, 1, None, closed="left")], "gates": ["boolean"], "gate_hidden": ["array-like"],
        "context_1": ["array-like"], "context_2": ["array-like"],
        "dropout": [Interval(Real, 0, 1, closed="left")], "batch_norm": ["boolean"],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "embedding_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "patience": [Interval(Integral, 1, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")], "multi": ["array-like"],
        "min_count": [Interval(Integral, 1, None, closed="left")],
        "numeric": [StrOptions({"standardize", "log", "bucket"})], "device": [str], "random_state": ["random_state"],
    }  # fmt: skip

    def __init__(
        self,
        dim: int = 16,
        hidden_1: Sequence[int] = (64, 64, 64),
        hidden_2: Sequence[int] = (64, 64, 64),
        heads: int = 1,
        gates: bool = True,
        gate_hidden: Sequence[int] = (64,),
        context_1: Sequence[str] = (),
        context_2: Sequence[str] = (),
        dropout: float = 0.0,
        batch_norm: bool = False,
        learning_rate: float = 1e-3,
        embedding_decay: float = 0.0,
        batch_size: int = 1024,
        max_epochs: int = 20,
        patience: int = 2,
        validation_fraction: float = 0.1,
        multi: Sequence[str] = (),
        min_count: int = 1,
        numeric: str = "standardize",
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        self.dim = dim
        self.hidden_1 = hidden_1
        self.hidden_2 = hidden_2
        self.heads = heads
        self.gates = gates
        self.gate_hidden = gate_hidden
        self.context_1 = context_1
        self.context_2 = context_2
        self.dropout = dropout
        self.batch_norm = batch_norm
        self.learning_rate = learning_rate
        self.embedding_decay = embedding_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.multi = multi
        self.min_count = min_count
        self.numeric = numeric
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> FinalMLPClassifier:
        """Learn from a table and two labels.

        Raises:
            ValueError: if there are not exactly two labels, or a setting is out of range.
        """
        if y is None:
            raise ValueError("FinalMLPClassifier requires y to be passed, but the target y is None")
        self._validate_params()  # pyright: ignore[reportAttributeAccessIssue]
        frame, labels = self._table(X, y)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(
                f"Only binary classification is supported: expected 2 classes, got {len(self.classes_)} class"
                + ("es" if len(self.classes_) > 1 else "")
            )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows = np.arange(len(codes))
        least = min(np.bincount(codes))
        held_out: Any = train_test_split(
            rows,
            test_size=self.validation_fraction,
            random_state=seed,
            stratify=codes if least > 1 and len(rows) > 20 else None,
        )
        train, held = held_out
        self.encoder_ = TableEncoder(self.multi, min_count=self.min_count, numeric=self.numeric).fit(frame.iloc[train])
        parts = [
            (*self.encoder_.encode(frame.iloc[part]), torch.from_numpy(codes[part]).float()) for part in (train, held)
        ]
        with seeded(seed):
            net = FinalMLP(
                self.encoder_.fields, self.dim, tuple(self.hidden_1), tuple(self.hidden_2), self.heads, self.gates,
                tuple(self.context_1), tuple(self.context_2), tuple(self.gate_hidden), self.dropout, self.batch_norm,
            )  # fmt: skip
        stopping = EarlyStopping("val_auc", self.patience, "max", restore_best=True)
        fit(net, parts[0], val=parts[1], rule=ClickRule(self.embedding_decay), optimizer=adam(self.learning_rate),
            epochs=self.max_epochs, batch_size=self.batch_size, seed=seed, device=self.device, evaluate=click_auc,
            early_stopping=stopping, progress=False)  # fmt: skip
        self.network_, self.validation_auc_ = net, stopping.best
        return self

    def _table(self, X: Any, y: Any = None) -> tuple[Any, Any]:
        """A DataFrame, and the labels; arrays get columns named after their place."""
        import pandas as pd

        if isinstance(X, pd.DataFrame):
            _validated(self, X, reset=y is not None, skip_check_array=True)
            if not len(X):
                raise ValueError("expected at least one row, got an empty table")
            if y is not None:
                y = np.asarray(y).ravel()
                if len(y) != len(X):
                    raise ValueError(f"expected as many labels as rows, got {len(y)} and {len(X)}")
                check_classification_targets(y)
            return X, y
        if y is None:
            array = _validated(self, X, reset=False)
        else:
            array, y = _validated(self, X, y)
            check_classification_targets(y)
        return pd.DataFrame(array, columns=[str(k) for k in range(array.shape[1])]), y

    def _inputs(self, X: Any) -> tuple[Tensor, Tensor]:
        check_is_fitted(self)
        return self.encoder_.encode(self._table(X)[0])

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits of the second label, `[N]`."""
        x, others = self._inputs(X)
        return _logits(self.network_.eval(), x, others).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of both labels, `[N, 2]`."""
        p = 1 / (1 + np.exp(-self.decision_function(X).astype(float)))
        return np.stack([1 - p, p], 1)

    def predict(self, X: Any) -> np.ndarray:
        """The likelier label, `[N]`."""
        check_is_fitted(self)
        return self.classes_[(self.decision_function(X) > 0).astype(int)]

    def feature_gates(self, X: Any) -> tuple[Any, Any]:
        """Mean gates of the columns, a DataFrame `N x F` for each stream: what it looks at, from 0 to 2."""
        import pandas as pd

        self.network_.eval()
        gate_values = self.network_.field_gates(
            *(t.to(next(self.network_.parameters()).device) for t in self._inputs(X))
        )
        names = list(self.encoder_.fields)
        return tuple(pd.DataFrame(gates.cpu().numpy(), columns=names) for gates in gate_values)  # pyright: ignore

    def __sklearn_tags__(self) -> Any:
        tags: Any = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def click_auc(model: nn.Module, data: Any) -> dict[str, float]:
    """AUC, and log loss, of batches (categories, others, label)."""
    from sklearn.metrics import roc_auc_score

    x, others, y = data.tensors if hasattr(data, "tensors") else data
    logits = _logits(model, x, others)
    loss = float(F.binary_cross_entropy_with_logits(logits, y.cpu()))
    both = 0 < float(y.mean()) < 1
    return {"loss": loss, "auc": float(roc_auc_score(y.cpu().numpy(), logits.numpy())) if both else 0.5}


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor, others: Tensor) -> Tensor:
    place = next(model.parameters()).device
    pairs = zip(x.split(4096), others.split(4096), strict=True)
    return torch.cat([model(a.to(place), b.to(place)).cpu() for a, b in pairs])


class ClickRule(LearningRule):
    """Binary cross-entropy, and the decay of the embeddings."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        self.model: Any = model
        return model

    def step(self, batch: Sequence[Tensor], backward: Any) -> dict[str, Tensor]:
        x, others, y = batch
        loss = F.binary_cross_entropy_with_logits(self.model(x, others), y)
        total = loss + self.decay * self.model.penalty() if self.decay else loss
        backward(total)
        return {"loss": loss.detach()}
