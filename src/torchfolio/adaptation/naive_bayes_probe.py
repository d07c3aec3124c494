"""Naive Bayes as a linear probe: a linear classifier on frozen features, in closed form and one pass over the data.

Chenyu Zheng, Guoqiang Wu, Fan Bao, Yue Cao, Chongxuan Li, Jun Zhu, "Revisiting Discriminative vs. Generative
Classifiers: Theory and Implications", ICML 2023, https://arxiv.org/abs/2302.02334.

With few labels, or where a plateau is to be reached with $O(\\log n)$ instead of $O(n)$ samples for n features, naive
Bayes beats logistic regression on the features of a pretrained network; with many labels it loses. `learning_curve`,
`crossover` and `samples_to_reach` tell on which side your labels are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor, nn

from torchfolio.adaptation.adapter import Adapted, Adapter, Adapting
from torchfolio.adaptation.bernoulli_probe import BernoulliProbe
from torchfolio.adaptation.consistency import consistency_bound, least_log_regret
from torchfolio.adaptation.gaussian_fit import GaussianFit, gaussian_fit
from torchfolio.adaptation.learning_curves import (
    LearningCurve,
    crossover,
    gaussian_mixture,
    learning_curve,
    samples_to_reach,
)
from torchfolio.adaptation.naive_bayes import NaiveBayesProbe
from torchfolio.checks import at_least, one_of, whole
from torchfolio.measure.batches import Data, batches
from torchfolio.measure.untouched import untouched
from torchfolio.models.features import take_features

__all__ = [
    "BernoulliProbe",
    "GaussianFit",
    "LearningCurve",
    "NaiveBayesHead",
    "NaiveBayesProbe",
    "consistency_bound",
    "crossover",
    "gaussian_fit",
    "gaussian_mixture",
    "learning_curve",
    "least_log_regret",
    "probe",
    "samples_to_reach",
]


def probe(
    network: nn.Module,
    layer: str,
    loader: Data,
    head: Literal["nb", "lr"] | Any = "nb",
    *,
    pool: bool = True,
    batch_size: int = 256,
) -> Any:
    """Fit a linear classifier on the features of a frozen network.

    Features are computed in evaluation mode without gradients; the network is left as it was.

    Args:
        network: frozen network.
        layer: dotted name of the module whose outputs are the features.
        loader: batches (x, y), a data set or a pair of tensors; y are class labels.
        head: `"nb"`, naive Bayes; `"lr"`, logistic regression (L2, C = 1, L-BFGS) on features scaled to [0, 1]; or a
            scikit-learn classifier, which is fitted in place.
        pool: whether maps `[B, C, ...]` and tokens `[B, T, D]` are averaged over positions; otherwise flattened.
        batch_size: size of the batches of tensors and data sets.

    Returns:
        The fitted classifier, of features `[N, n]`.

    Raises:
        ValueError: if the network has no such layer, or there is no example.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        >>> x, y = torch.randn(60, 1, 8, 8), torch.arange(60) % 3
        >>> probe(net, "1", (x, y)).to_linear()
        Linear(in_features=4, out_features=3, bias=True)
    """
    if isinstance(head, str):
        one_of("head", head, ("nb", "lr"))
        logistic = make_pipeline(MinMaxScaler(), LogisticRegression(C=1.0, max_iter=1000))
        head = NaiveBayesProbe() if head == "nb" else logistic
    pairs = list(_features(network, layer, loader, pool, batch_size))
    features, y = torch.cat([f for f, _ in pairs]), torch.cat([y for _, y in pairs])
    if isinstance(head, NaiveBayesProbe):
        return head.fit(features, y)
    return head.fit(features.double().cpu().numpy(), y.cpu().numpy())


def _features(
    network: nn.Module, layer: str, data: Data, pool: bool, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels, batch by batch."""
    like = next(network.parameters(), None)
    with (
        torch.no_grad(),
        untouched(network, training=False),
        take_features(network, layer, flatten="pool" if pool else "all", detach=True) as features,
    ):
        for x, y in batches(data, batch_size, None if like is None else like.device):
            network(x)
            yield features[layer], y


class NaiveBayesHead(Adapter):
    """Give a trained network a naive Bayes classifier in place of its last layer, and leave the rest frozen.

    Features are computed once, batch by batch in evaluation mode; nothing is trained. With other classes than the
    network's the last layer gets another width.

    Args:
        epsilon: variance that is added, see `NaiveBayesProbe`, as the two below.
        var_smoothing: part of the largest feature's total variance that is added to each.
        prior: `"empirical"`, `"uniform"`, or probabilities in the order of the labels.
        batch_size: size of the batches of tensors and data sets.

    Raises:
        ValueError: in `adapt`, if the network's output is not that of an `nn.Linear` with a bias on features `[B, n]`,
            labels are not from 0 to the number of classes - 1, or a class has no sample.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> x, y = torch.randn(60, 1, 4, 4), torch.arange(60) % 3
        >>> NaiveBayesHead().adapt(net, (x, y), num_classes=3, device="cpu").model[3]
        Linear(in_features=32, out_features=3, bias=True)
    """

    def __init__(
        self,
        epsilon: float = 1e-9,
        var_smoothing: float = 0.0,
        prior: Literal["empirical", "uniform"] | Sequence[float] = "empirical",
        batch_size: int = 256,
    ) -> None:
        self.epsilon, self.var_smoothing = at_least("epsilon", epsilon, 0), at_least("var_smoothing", var_smoothing, 0)
        self.prior, self.batch_size = prior, whole("batch_size", batch_size, 1)
        self._width: int | None = None

    def _adapt(self, model: nn.Module, data: Data, run: Adapting) -> Adapted:
        head = NaiveBayesProbe(epsilon=self.epsilon, var_smoothing=self.var_smoothing, prior=self.prior)
        name, layer = "", nn.Linear(1, 1, device="meta")
        with torch.no_grad(), untouched(model, training=False):
            for x, y in batches(data, self.batch_size, run.device):
                if not name:
                    name, layer = _last_linear(model, x)
                    K = run.num_classes or layer.out_features
                head.partial_fit(_inputs(model, layer, x), y, classes=np.arange(K))
        last = head.to_linear(dtype=layer.weight.dtype, device=layer.weight.device)
        self._width = None if last.out_features == layer.out_features else last.out_features
        if self._width is None:
            with torch.no_grad():
                layer.weight.copy_(last.weight)
                layer.bias.copy_(last.bias)
        elif name:
            model.set_submodule(name, last)
        else:
            model = last
        return Adapted(model, {"samples": int(head.class_count_.sum()), "features": last.in_features})

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        """The same network, with as many outputs as there are classes."""
        if self._width is None:
            return network
        key = next((k for k in ("num_classes", "out_features") if k in network["arguments"]), None)
        if key is None:
            raise ValueError(
                f"{network['build']} was built without num_classes or out_features, by which it would get "
                f"{self._width} outputs"
            )
        return {**network, "arguments": {**network["arguments"], key: self._width}}


def _last_linear(model: nn.Module, x: Tensor) -> tuple[str, nn.Linear]:
    """The linear layer whose output is the network's."""
    outputs: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        end = model(x)
    finally:
        for handle in handles:
            handle.remove()
    name = next((name for name, output in outputs.items() if output is end), None)
    layer = None if name is None else model.get_submodule(name)
    if not isinstance(layer, nn.Linear) or layer.bias is None or end.dim() != 2:
        raise ValueError("expected a network whose output [B, C] is that of an nn.Linear with a bias")
    return str(name), layer


def _inputs(model: nn.Module, layer: nn.Linear, x: Tensor) -> Tensor:
    """What a layer is given when the network runs."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"expected the last layer to run once a pass, it ran {len(seen)} times")
    return seen[0]
