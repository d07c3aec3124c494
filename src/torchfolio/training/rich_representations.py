"""Rich representations: features of several trainings, concatenated.

Jianyu Zhang, Léon Bottou, "Learning useful representations for shifting tasks and distributions", ICML 2023,
https://arxiv.org/abs/2212.07346.

One training keeps the features that still lower its loss and drops those that say the same again. Weight decay on a
product of layers is an L1 penalty: $\\min \\tfrac12 (\\|u\\|^2 + \\|v\\|^2)$ subject to $u \\odot v = \\beta$ is
$\\|\\beta\\|_1$. Another seed drops others. So train $n$ times, drop the heads, and concatenate:
$\\Phi(x) = [\\varphi_1(x), \\dots, \\varphi_n(x)]$. Put a linear probe on it for new tasks; fold it into one network by
distillation where inference must be cheap; or fine-tune in two stages, since fine-tuning it as a whole drops them again.

The file is longer than most because the paper uses the concatenation in four ways: probes, distillation, fine-tuning, and
features for other estimators. Episodes come from `torchfolio.training.episodes`, or from one training at a high constant rate by `Snapshots`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from torchfolio.checks import at_least, labels, one_of, positive, whole
from torchfolio.data import Examples
from torchfolio.engine import Batch, LearningRule, fit, seeded
from torchfolio.measure import outputs, untouched

__all__ = [
    "Concatenated",
    "CosineClassifier",
    "LinearProbe",
    "RichDistillation",
    "RichFeatures",
    "average_heads",
    "split_head",
    "two_stage_finetune",
    "vrex_penalty",
]


def split_head(model: nn.Module, name: str | None = None) -> tuple[nn.Module, nn.Linear]:
    """A network's trunk and its linear head, as copies.

    Args:
        model: network whose last layer is linear.
        name: of the head among its modules; by default the last linear layer there is.

    Returns:
        The network with an identity in place of the head, and the head.

    Raises:
        ValueError: if there is no linear layer, or none of this name.
    """
    twin = copy.deepcopy(model)
    linear = {n: m for n, m in twin.named_modules() if isinstance(m, nn.Linear)}
    name = next(reversed(linear), None) if name is None else name
    if name not in linear:
        raise ValueError(f"expected a network with a linear head, got {type(model).__name__} with {list(linear)}")
    if not name:
        return nn.Identity(), linear[name]
    twin.set_submodule(name, nn.Identity())
    return twin, linear[name]


class Concatenated(nn.Module):
    """The features of several trunks side by side, $[\\varphi_1(x), \\dots, \\varphi_n(x)]$.

    Frozen and in evaluation mode, whatever mode the network around it is in, unless it is to be fine-tuned.

    Args:
        trunks: networks to features `[B, d_i]`, of any architectures.
        normalize: scale every block to unit length, so that none dominates a cosine.
        frozen: keep weights and running statistics as they are.

    Attributes:
        feature_dims: $d_i$, known after the first call.

    Shapes:
        Inputs of the trunks to `[B, d_1 + … + d_n]`.

    Raises:
        ValueError: on no trunk, or trunks that share parameters; in the call, on features of another shape.

    Reference:
        Zhang, Bottou, section 3.
    """

    def __init__(self, trunks: Iterable[nn.Module], *, normalize: bool = False, frozen: bool = True) -> None:
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        if not self.trunks:
            raise ValueError("expected at least one trunk, got none")
        owned = [id(p) for trunk in self.trunks for p in trunk.parameters()]
        if len(set(owned)) < len(owned):
            raise ValueError("expected trunks with parameters of their own; two of them share some")
        self.normalize, self.frozen = normalize, frozen
        self.feature_dims: tuple[int, ...] = ()
        if frozen:
            self.requires_grad_(False)
        self.train(not frozen)

    def train(self, mode: bool = True) -> Concatenated:
        """Set the mode; a frozen concatenation stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def block(self, i: int) -> slice:
        """The columns of trunk i's features."""
        if not self.feature_dims:
            raise RuntimeError("the widths of the blocks are known after the first call")
        start = sum(self.feature_dims[: whole("i", i, 0, len(self.trunks) - 1)])
        return slice(start, start + self.feature_dims[i])

    def forward(self, x: Tensor) -> Tensor:
        blocks = [trunk(x) for trunk in self.trunks]
        for k, block in enumerate(blocks):
            if block.dim() != 2:
                raise ValueError(
                    f"expected trunk {k} to give features [B, d], got {tuple(block.shape)}; pool or flatten them"
                )
        self.feature_dims = tuple(block.shape[1] for block in blocks)
        return torch.cat([F.normalize(b, dim=1) for b in blocks] if self.normalize else blocks, dim=1)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, frozen={self.frozen}"


def average_heads(heads: Sequence[nn.Linear]) -> nn.Linear:
    """The head of a concatenation whose logits are the mean of the networks': $W = [W_1 | \\dots | W_n] / n$.

    Args:
        heads: linear layers of equal outputs, in the order of the trunks.

    Returns:
        A new layer with weight `[K, d_1 + … + d_n]` and bias $\\sum_i b_i / n$.

    Raises:
        ValueError: on no head, or other numbers of outputs.
    """
    if not heads:
        raise ValueError("expected at least one head, got none")
    outs = {head.out_features for head in heads}
    if len(outs) > 1:
        raise ValueError(f"expected heads of equal outputs, got {sorted(outs)}")
    weights = [head.weight.detach() for head in heads]
    biases = [head.bias.detach() for head in heads if head.bias is not None]
    weight = torch.cat(weights, dim=1) / len(heads)
    head = nn.Linear(weight.shape[1], weight.shape[0], bool(biases), device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if biases:
            head.bias.copy_(torch.stack(biases).sum(0) / len(heads))
    return head


class LinearProbe(nn.Module):
    """Batch norm and a linear classifier on frozen features.

    The features of the training data are computed once. SGD with Nesterov momentum; weight decay on the linear layer
    alone, to be chosen on validation data for every number of features.

    Args:
        features: network to features `[B, d]`, left as it is: `Concatenated(trunks)`, or one trunk.
        num_classes: outputs.
        batch_norm: standardise the features, without which blocks of larger norm dominate.

    Raises:
        ValueError: in `fit`, on labels out of range or features of another shape.

    Example:
        >>> probe = LinearProbe(Concatenated(trunks), 10).fit(x, y, weight_decay=1e-3)
        >>> evaluate(probe, test)

    Reference:
        The released code's linear probing.
    """

    def __init__(self, features: nn.Module, num_classes: int, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.features = features.requires_grad_(False).eval()
        self.num_classes, self.batch_norm = whole("num_classes", num_classes, 2), batch_norm
        norm = nn.LazyBatchNorm1d() if batch_norm else nn.Identity()
        self.classifier = nn.Sequential(norm, nn.LazyLinear(num_classes))

    def train(self, mode: bool = True) -> LinearProbe:
        """Set the mode of the classifier; the features stay in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))

    def fit(
        self,
        x: Any,
        y: Tensor | None = None,
        *,
        lr: float = 0.01,
        weight_decay: float = 1e-3,
        epochs: int = 28,
        batch_size: int = 256,
        seed: int = 0,
    ) -> LinearProbe:
        """Fit the classifier; the rate falls tenfold after 2/7, 4/7 and 6/7 of the epochs.

        Args:
            x: inputs, with `y`; or data as `torchfolio.data.Examples` takes, with labels.
            y: labels `[N]`.
            lr: learning rate.
            weight_decay: of the linear layer's weight.
            epochs: passes over the features.
            batch_size: examples of a step.
            seed: of the initial weights and the order.
        """
        positive("lr", lr)
        at_least("weight_decay", weight_decay, 0)
        examples = Examples(x if y is None else (x, y))
        y = labels(_targets_of(examples), self.num_classes)
        features = outputs(self.features, examples)
        if features.dim() != 2:
            raise ValueError(f"expected features [B, d], got {tuple(features.shape)}; pool or flatten them")
        device = next((p.device for p in self.features.parameters()), torch.device("cpu"))
        norm = nn.BatchNorm1d(features.shape[1]) if self.batch_norm else nn.Identity()
        with seeded(seed):
            linear = nn.Linear(features.shape[1], self.num_classes)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        self.classifier = nn.Sequential(norm, linear).to(features.dtype)

        def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
            rest = [p for p in parameters if p is not linear.weight]
            groups = [{"params": [linear.weight], "weight_decay": weight_decay}, {"params": rest}]
            return SGD(groups, lr=lr, momentum=0.9, nesterov=True)

        falls = [max(1, round(epochs * k / 7)) for k in (2, 4, 6)]
        last_one = len(features) % batch_size == 1 and len(features) > 1 and self.batch_norm
        fit(self.classifier, (features, y), optimizer=optimizer, scheduler=partial(MultiStepLR, milestones=falls),
            schedule="epoch", epochs=epochs, batch_size=batch_size, drop_last=last_one, seed=seed, device=device,
            progress=False)  # fmt: skip
        return self


class CosineClassifier(nn.Module):
    """Logits $s \\cos(w_k, f)$, for few labels.

    Args:
        in_features: width of the features.
        num_classes: outputs.
        scale: $s > 0$.

    Reference:
        Chen et al., "A Closer Look at Few-shot Classification", ICLR 2019 (Baseline++).
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = positive("scale", scale)
        self.weight = nn.Parameter(torch.randn(num_classes, in_features) / in_features**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


def two_stage_finetune(
    models: Sequence[nn.Module],
    finetune: Callable[[nn.Module, int], object],
    data: Any,
    *,
    lr: float = 1e-3,
    epochs: int = 2,
    batch_size: int = 256,
    seed: int = 0,
) -> nn.Sequential:
    """Fine-tune each network by itself, concatenate, average the heads, then train the head a little.

    Args:
        models: networks with a linear head for the target task; left as they are.
        finetune: trains a network in place on the target, given a seed: `lambda net, seed: fit(net, data, …)`.
        data: the target's examples with labels, for the head.
        lr: of the head's SGD with Nesterov momentum.
        epochs: of the head; 0 leaves the mean of the networks' logits.
        batch_size: of the head.
        seed: of the first network; the others take the next ones.

    Returns:
        The concatenation, frozen, and its head.

    Raises:
        ValueError: on no network, one without a linear head, or heads of other outputs.

    Reference:
        Zhang, Bottou, section 5; without batch norm before the head, so that it starts as the ensemble.
    """
    pairs = []
    for k, model in enumerate(models):
        tuned = copy.deepcopy(model)
        finetune(tuned, seed + k)
        pairs.append(split_head(tuned))
    joint = nn.Sequential(Concatenated(trunk for trunk, _ in pairs), average_heads([head for _, head in pairs]))
    if whole("epochs", epochs, 0):
        sgd = partial(SGD, lr=lr, momentum=0.9, nesterov=True)
        features, device = outputs(joint[0], data), next(joint[1].parameters()).device
        fit(joint[1], (features, _targets_of(data)), optimizer=sgd, epochs=epochs, batch_size=batch_size, seed=seed,
            device=device, progress=False)  # fmt: skip
    return joint.eval()


def _targets_of(data: Any) -> Tensor:
    return torch.cat([row[-1] for row in Examples(data).batches(512)])


class RichDistillation(LearningRule):
    """Fold several networks into one trunk: it must serve a temporary linear head for each of them.

    $$\\sum_i \\tau^2\\, \\mathrm{KL}\\bigl(\\operatorname{softmax}(t_i(x)/\\tau) \\,\\|\\,
      \\operatorname{softmax}(u_i(\\Phi(x))/\\tau)\\bigr),$$

    the mean over the batch. Labels are not used, and the heads $u_i$ are left behind.

    Args:
        teachers: trained networks with logits $t_i$; evaluated, never changed.
        tau: temperature $\\tau > 0$.
        heads: `"separate"`, or `"averaged"` for one head and the mean of the teachers' probabilities.

    Shapes:
        The trained network is a trunk to features `[B, d]`; batches are (x, y).

    Raises:
        ValueError: on no teacher or settings out of range; in `prepare`, on a trunk without features `[B, d]`.

    Example:
        >>> trunk, _ = split_head(fresh_network)
        >>> fit(trunk, train, rule=RichDistillation(networks), epochs=12)

    Reference:
        Zhang, Bottou, section 3 (DISTILL).
    """

    def __init__(self, teachers: Sequence[nn.Module], tau: float = 10.0, heads: str = "separate") -> None:
        if not teachers:
            raise ValueError("expected at least one teacher, got none")
        self.teachers, self.tau = list(teachers), positive("tau", tau)
        self.heads = one_of("heads", heads, ("separate", "averaged"))
        self.module: nn.ModuleDict | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        x = example[0]
        with torch.no_grad(), untouched(model, training=False):
            features = model(x)
        if features.dim() != 2:
            raise ValueError(f"expected a trunk to features [B, d], got {tuple(features.shape)}; pool or flatten them")
        widths = [self._targets(x, teacher).shape[1] for teacher in self.teachers]
        if self.heads == "averaged":
            if len(set(widths)) > 1:
                raise ValueError(f"expected teachers of equal outputs for one averaged head, got {widths}")
            widths = widths[:1]
        temporary = nn.ModuleList(nn.Linear(features.shape[1], width) for width in widths).to(features)
        self.module = nn.ModuleDict({"trunk": model, "heads": temporary})
        return self.module

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.module is None:
            raise RuntimeError("call prepare(model, example) before step")
        x = batch[0]
        targets = [self._targets(x, teacher) for teacher in self.teachers]
        if self.heads == "averaged":
            targets = [torch.stack(targets).mean(0)]
        features = self.module["trunk"](x)
        terms = []
        heads: Any = self.module["heads"]
        for head, target in zip(heads, targets, strict=True):
            log_q = (head(features) / self.tau).log_softmax(1)
            terms.append(self.tau**2 * F.kl_div(log_q, target.to(log_q), reduction="batchmean"))
        loss = torch.stack(terms).sum()
        backward(loss)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def _targets(self, x: Tensor, teacher: nn.Module) -> Tensor:
        """Probabilities of a teacher at the temperature."""
        if next((p.device for p in teacher.parameters()), x.device) != x.device:
            teacher.to(x.device)
        with untouched(teacher, training=False):
            return (teacher(x) / self.tau).softmax(1)


def vrex_penalty(risks: Tensor, beta: float) -> Tensor:
    """The objective of vREx over environments: mean risk and $\\beta$ times their variance.

    Args:
        risks: one mean loss for each environment, `[E]`, at least two.
        beta: weight of the variance, at least 0.

    Raises:
        ValueError: on other shapes, or a negative weight.

    Reference:
        Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation", ICML 2021, equation 8.
    """
    if risks.dim() != 1 or len(risks) < 2:
        raise ValueError(f"expected risks [E] of at least two environments, got shape {tuple(risks.shape)}")
    return risks.mean() + at_least("beta", beta, 0) * risks.var(correction=0)


class RichFeatures(TransformerMixin, BaseEstimator):
    """The concatenation as a scikit-learn transformer, to put before any estimator.

    Args:
        trunks: networks to features `[B, d_i]`.
        shape: of one input, into which the rows of X are folded; `None` keeps them as they are.
        normalize: scale every block to unit length.
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
