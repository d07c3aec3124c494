"""Which training examples make the loss spike: pairs of small groups whose gradients oppose each other.

Record the loss of every example at every step; take the step at which the mean loss first rises; the examples whose loss
rose and fell most there are the two groups. They are chosen by the change of their loss and not by its size, and shown
beside random groups: how far their gradients oppose each other, how much of the sharpness they own, whether they swap at
the next step. Losses along a training are in `loss_traces`, the solvable model in `opposing_model`, the optimizer of the
case study in `sign_split_sgd`.

Reference:
    Rosenfeld, Risteski, Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization, ICLR 2024
    (arXiv 2311.04163), Sections 2, 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import finite, positive, whole
from torchfolio.data import Examples
from torchfolio.insight.loss_traces import LossRecorder, Trace, trace
from torchfolio.insight.opposing_model import ModelPath, OpposingSignalModel
from torchfolio.insight.sign_split_sgd import SignSplitSGD
from torchfolio.measure import Hessian, hessian_eigenvalues, loss_gradients, untouched
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LossRecorder",
    "ModelPath",
    "OpposingGroups",
    "OpposingSignalModel",
    "SignSplitSGD",
    "Trace",
    "find_groups",
    "inject",
    "measure_groups",
    "trace",
]


@dataclass(frozen=True, repr=False)
class OpposingGroups(Shown):
    """Two groups of examples behind one step.

    Attributes:
        step: t; the change is from t to t + 1.
        positive: examples whose loss rose most, `[k]`, the most first.
        negative: examples whose loss fell most, `[k]`.
        delta: change of every example's loss at this step, `[n]`.
        score: largest change of every example in the window, $\\max_t |\\Delta_i(t)|$, `[n]`.
        opposition: correlation over the window of the groups' mean changes, near -1 at the edge of stability.
        concentration: share of the sum of all changes that the 2 % of examples with the largest ones carry.
        alternation: mean change of the first group at this step times that at the next; negative where they swap.
        instability: whether the mean loss rose at any recorded step. Where it did not, no instability was seen, and the
            groups are those of the step with the most uneven changes.
    """

    step: int
    positive: np.ndarray
    negative: np.ndarray
    delta: np.ndarray
    score: np.ndarray
    opposition: float
    concentration: float
    alternation: float
    instability: bool


def find_groups(
    losses: Any, k: int | None = None, step: int | None = None, window: int | None = None
) -> OpposingGroups:
    """Find the examples whose loss moves most at the step at which the mean loss first rises.

    Args:
        losses: `[T, n]`, a row for each step.
        k: size of each group; 2 % of the examples, at least 10 (at most half of them), by default.
        step: step in place of the first rise.
        window: steps around it for scores and correlations; all by default.

    Raises:
        ValueError: if there are fewer than two steps, a loss is not finite, k is above half of the examples, or the step
            is not recorded.
    """
    table = np.asarray(losses, dtype=float)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 2:
        raise ValueError(f"expected losses [T, n] of at least two steps and two examples, got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("expected finite losses, got NaN or infinity: the training diverged")
    n = table.shape[1]
    k = min(max(10, round(0.02 * n)), n // 2) if k is None else whole("k", k, 1, n // 2)
    changes = np.diff(table, axis=0)
    rises = np.flatnonzero(changes.mean(1) > 0)
    instability = len(rises) > 0
    if step is None:
        step = int(rises[0]) if instability else int(_kurtosis(changes).argmax())
    whole("step", step, 0, len(changes) - 1)
    delta = changes[step]
    order = delta.argsort(kind="stable")
    positive, negative = order[::-1][:k].copy(), order[:k].copy()
    reach = len(changes) if window is None else whole("window", window, 1)
    near = changes[max(0, step - reach) : step + reach + 1]
    means = near[:, positive].mean(1), near[:, negative].mean(1)
    varied = len(near) > 1 and min(m.std() for m in means) > 0
    size = np.sort(np.abs(delta))[::-1]
    follows = changes[step + 1, positive].mean() if step + 1 < len(changes) else np.nan
    return OpposingGroups(
        step, positive, negative, delta, np.abs(near).max(0),
        float(np.corrcoef(*means)[0, 1]) if varied else float("nan"),
        float(size[: max(1, round(0.02 * n))].sum() / max(size.sum(), 1e-300)),
        float(delta[positive].mean() * follows), bool(instability),
    )  # fmt: skip


def _kurtosis(changes: np.ndarray) -> np.ndarray:
    centred = changes - changes.mean(1, keepdims=True)
    return (centred**4).mean(1) / np.maximum((centred**2).mean(1) ** 2, 1e-300)


def measure_groups(
    model: nn.Module,
    data: Any,
    groups: OpposingGroups,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    n_random: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """What makes two groups opposing signals, beside random groups of their size.

    Args:
        model: network, with the weights of the step of the groups; it is left as it was, asked in evaluation mode.
        data: examples that the groups count.
        groups: groups of `find_groups`.
        loss: criterion with mean reduction.
        n_random: pairs of random groups.
        seed: seed of these.

    Returns:
        Rows `opposing` and `random` (means over the pairs): `cosine` of the two mean gradients, `norm_ratio` of their
        norms to those of random groups, `projection_1` and `projection_2` on the top eigenvector v of the Hessian over
        the norms (their signs are to be compared with each other), `curvature_1` and `curvature_2`, $v^\\top H_S v / \\lambda_1$,
        `input_norm_1` and `input_norm_2` over that of all examples, `input_mean_1` and `input_mean_2`, the mean of the
        inputs (brightness, of images) less that of all.
    """
    import pandas as pd

    rows = list(Examples(data).batches(None))
    *inputs, target = rows[0] if len(rows) == 1 else [torch.cat(column) for column in zip(*rows, strict=True)]
    if len(inputs) != 1 or not inputs[0].is_floating_point():
        raise ValueError("expected one floating-point input an example, to measure its norm and gradients")
    if len(target) != len(groups.delta):
        raise ValueError(f"expected the {len(groups.delta)} examples that the groups count, got {len(target)}")
    weight = next(model.parameters())
    device, x, y = weight.device, finite("x", inputs[0]).to(weight.dtype), target
    rng = np.random.default_rng(seed)
    k, n = len(groups.positive), len(y)
    pairs = [("opposing", groups.positive, groups.negative)]
    for _ in range(whole("n_random", n_random, 1)):
        drawn = rng.permutation(n)[: 2 * k]
        pairs.append(("random", drawn[:k], drawn[k:]))
    with untouched(model, training=False):
        top = hessian_eigenvalues(model, loss, (x, y), generator=torch.Generator().manual_seed(seed))
        v, scale = top.vectors[:, 0], float(top.values[0])
        overall, brightness = float(x.flatten(1).norm(dim=1).mean()), float(x.mean())
        table = []
        for kind, *members in pairs:
            figures: dict[str, Any] = {"kind": kind}
            gradients = []
            for side, member in enumerate(members, start=1):
                part = (x[member].to(device), y[member].to(device))
                g = torch.cat([t.flatten() for t in loss_gradients(model, loss, part).values()])
                gradients.append(g)
                figures[f"projection_{side}"] = float(g @ v / g.norm())
                figures[f"curvature_{side}"] = float(v @ Hessian(model, loss, part)(v)) / scale
                figures[f"input_norm_{side}"] = float(x[member].flatten(1).norm(dim=1).mean()) / overall
                figures[f"input_mean_{side}"] = float(x[member].mean()) - brightness
            figures["cosine"] = float(F.cosine_similarity(gradients[0], gradients[1], dim=0))
            figures["norm"] = float(sum(g.norm() for g in gradients)) / 2
            table.append(figures)
    frame: Any = pd.DataFrame(table).groupby("kind", sort=False).mean()
    frame["norm_ratio"] = frame["norm"] / frame.loc["random", "norm"]
    return frame.drop(columns="norm")


def inject(
    x: Tensor,
    y: Tensor,
    classes: tuple[int, int],
    n: int,
    strength: float = 3.0,
    pattern: Tensor | None = None,
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Plant an opposing signal: a strong common feature in a few examples of two classes.

    Args:
        x: images `[N, C, H, W]` or features `[N, D]`.
        y: labels `[N]`.
        classes: two classes.
        n: number of examples changed, half in each class.
        strength: mean factor of the pattern; it is drawn between 2/3 and 4/3 of this for each example.
        pattern: pattern that is added, of the shape of one example or one number a channel; a random colour by default.
        seed: seed of the choice.

    Returns:
        The changed inputs, $0.3 x$ plus the pattern, and which were changed, bool `[N]`.
    """
    if whole("n", n, 2) % 2:
        raise ValueError(f"expected an even number of examples, half in each class, got {n}")
    if classes[0] == classes[1]:
        raise ValueError(f"expected two classes, got {classes[0]} twice")
    if not finite("x", x).is_floating_point():
        raise TypeError(f"expected inputs in floating point, got {x.dtype}")
    positive("strength", strength)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(y), dtype=torch.bool)
    for label in classes:
        where = (y == label).nonzero()[:, 0]
        if len(where) < n // 2:
            raise ValueError(f"expected at least {n // 2} examples of class {label}, got {len(where)}")
        chosen[where[torch.randperm(len(where), generator=generator)[: n // 2]]] = True
    feature = torch.randn(x.shape[1], generator=generator) if pattern is None else pattern
    if pattern is None:
        feature = feature / feature.norm() * x.shape[1] ** 0.5
    feature = feature.to(x)
    feature = feature.view(-1, *[1] * (x.dim() - 2)) if feature.dim() == 1 and x.dim() > 2 else feature
    factor = strength * (2 / 3 + 2 / 3 * torch.rand(int(chosen.sum()), generator=generator)).to(x)
    out = x.clone()
    out[chosen] = 0.3 * x[chosen] + factor.view(-1, *[1] * (x.dim() - 1)) * feature
    return out, chosen
