"""A trained memory network on a stream, by the words of scikit-learn: it goes on learning without going backward."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, r2_score
from torch import Tensor

from torchfolio.engine import evaluating
from torchfolio.training.fast_state import FastState
from torchfolio.training.memory_network import FastSlowMemoryNetwork

__all__ = ["FastSlowEstimator"]


class FastSlowEstimator(BaseEstimator):
    """Learns from a stream by the fast weights and the memory of a network that was trained over episodes before.

    The network itself is left as it is; what the stream taught is `state_`.

    Args:
        network: trained `FastSlowMemoryNetwork`.

    Attributes:
        state_: `FastState` of one sequence.
        classes_: labels in the order they came, for classification; at most the network's `out_dim`.
        n_seen_: examples seen.

    Example:
        >>> stream = FastSlowEstimator(network)
        >>> for x, y in batches:
        ...     stream.partial_fit(x, y)
        >>> stream.predict(x_new)
    """

    def __init__(self, network: FastSlowMemoryNetwork) -> None:
        self.network = network

    def fit(self, X: Any, y: Any) -> FastSlowEstimator:
        """Start afresh, and learn from examples in their order."""
        for name in ("state_", "classes_", "n_seen_"):
            self.__dict__.pop(name, None)
        return self.partial_fit(X, y)

    @torch.no_grad()
    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> FastSlowEstimator:
        """Learn from further examples, one after another.

        Args:
            X: examples `[N, ...]`; tables and arrays become floating point, whole numbers in a tensor (tokens) stay.
            y: any labels for classification, numbers for regression.
            classes: labels to number in advance, in this order; those not named are numbered as they come.

        Raises:
            ValueError: on more classes than the network has outputs, NaN, or lengths that differ.
            TypeError: if the network is no `FastSlowMemoryNetwork`.
        """
        x, y = self._inputs(X), np.asarray(y)
        if len(x) != len(y):
            raise ValueError(f"expected as many targets as examples, got {len(y)} and {len(x)}")
        fresh = not hasattr(self, "state_")
        names = [] if fresh else list(getattr(self, "classes_", ()))
        targets = self._numbered(y, names, classes) if self._classifies else self._numbers(y)
        state = self.network.init_state(1) if fresh else self.state_
        with evaluating(self.network):
            for k in range(len(x)):
                _, context = self.network.step(state, x[k : k + 1])
                state = self.network.observe(state, context, targets[k : k + 1])
        self.state_: FastState = state.detach()
        self.n_seen_ = len(x) + (0 if fresh else self.n_seen_)
        if self._classifies:
            self.classes_ = np.asarray(names)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Targets of examples as things stand; nothing is learned from them."""
        output = self._outputs(X)
        if not self._classifies:
            return output.squeeze(1).numpy() if output.shape[1] == 1 else output.numpy()
        return self.classes_[output[:, : len(self.classes_)].argmax(1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes seen, `[N, len(classes_)]`."""
        if not self._classifies:
            raise ValueError("a network for regression has no probabilities")
        return self._outputs(X)[:, : len(self.classes_)].softmax(1).numpy()

    def score(self, X: Any, y: Any) -> float:
        """Accuracy for classification, R^2 for regression."""
        return float((accuracy_score if self._classifies else r2_score)(y, self.predict(X)))

    @property
    def _classifies(self) -> bool:
        return self.network.task == "classification"

    @torch.no_grad()
    def _outputs(self, X: Any) -> Tensor:
        if not hasattr(self, "state_"):
            raise NotFittedError("call fit or partial_fit first: nothing was seen yet")
        x = self._inputs(X)
        with evaluating(self.network):
            output, _ = self.network.step(self.state_.map(lambda v: v.expand(len(x), *v.shape[1:])), x)
        return output.float().cpu()

    def _inputs(self, X: Any) -> Tensor:
        if not isinstance(self.network, FastSlowMemoryNetwork):
            raise TypeError(f"expected a FastSlowMemoryNetwork, got {type(self.network).__name__}")
        weight = self.network.readout.weight
        tokens = isinstance(X, Tensor) and not X.is_floating_point()
        x = X if isinstance(X, Tensor) else torch.tensor(np.asarray(X))
        x = x.to(weight.device, None if tokens else weight.dtype)
        if x.dim() < 2 or not len(x):
            raise ValueError(f"expected examples [N, ...], one or more, got shape {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("expected examples to be finite, got NaN or infinite ones")
        return x

    def _numbers(self, y: np.ndarray) -> Tensor:
        weight = self.network.readout.weight
        return torch.as_tensor(y.reshape(len(y), -1).astype(float)).to(weight.device, weight.dtype)

    def _numbered(self, y: np.ndarray, names: list[Any], classes: Any) -> Tensor:
        """Numbers of labels, new ones in the order they come; `names` grows."""
        if any(label != label for label in y.tolist()):
            raise ValueError("expected labels, got NaN among them")
        for label in [*(() if classes is None else classes), *cast("list[Any]", y.tolist())]:
            if label not in names:
                names.append(label)
        if len(names) > self.network.out_dim:
            raise ValueError(f"expected at most {self.network.out_dim} classes, got {len(names)}: {names}")
        return torch.tensor([names.index(label) for label in y.tolist()], device=self.network.readout.weight.device)
