"""The geometry of a representation: does it mirror inputs or labels, and are variables coded abstractly?

Measures on the responses of a layer to several conditions (clusters, classes): alignment of kernels with inputs and with
labels, parallelism of a dichotomy, generalisation across conditions (CCGP), decoding of all dichotomies, dimension. The
toy tasks and networks in which tanh and ReLU differ are in `cluster_tasks` and `shallow_networks`, what is measured of
dichotomies in `abstraction`.

Reference:
    Alleman, Lindsey, Fusi, Task structure and nonlinearity jointly determine learned representational geometry, ICLR
    2024 (arXiv 2401.13558); CCGP and parallelism: Bernardi et al., Cell 2020.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.checks import finite
from torchfolio.data import Examples
from torchfolio.insight.abstraction import (
    EXACT,
    ccgp,
    condition_means,
    decoding_accuracy,
    dichotomies,
    parallelism_score,
)
from torchfolio.insight.cluster_tasks import (
    ClusterTask,
    aligned_kernel,
    kernel_to_inputs,
    random_clusters,
    separable_xor,
)
from torchfolio.insight.shallow_networks import (
    ACTIVATIONS,
    Activation,
    ShallowNetwork,
    expected_gradient,
    train_side_by_side,
    weight_trajectories,
)
from torchfolio.measure import Analysis, Panel, cka_from_kernels
from torchfolio.models import collect_features

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ClusterTask",
    "Geometry",
    "ShallowNetwork",
    "aligned_kernel",
    "ccgp",
    "condition_means",
    "decoding_accuracy",
    "dichotomies",
    "expected_gradient",
    "geometry",
    "kernel_alignment",
    "kernel_to_inputs",
    "parallelism_score",
    "participation_ratio",
    "random_clusters",
    "separable_xor",
    "train_side_by_side",
    "weight_trajectories",
]


def kernel_alignment(K: Any, L: Any, *, unbiased: bool = False) -> float:
    """Centred alignment $\\langle K, L \\rangle / (\\lVert K \\rVert \\lVert L \\rVert)$ of two kernels `[N, N]`.

    Args:
        K: kernel, tensor or array.
        L: kernel over the same conditions or samples.
        unbiased: whether the diagonal is left out, for few samples; at least 4.

    Returns:
        In [-1, 1]; NaN with a warning where a representation is constant.
    """
    a, b = (torch.as_tensor(k, dtype=torch.float64) for k in (K, L))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(cka_from_kernels(a, b, unbiased=unbiased))
    constant = [name for name, k in (("K", a), ("L", b)) if _centred_norm(k) <= 1e-10 * max(float(k.norm()), 1e-300)]
    if constant:
        warnings.warn(f"{constant[0]} is the kernel of a constant representation: no alignment", stacklevel=2)
        return math.nan
    return value


def _centred_norm(k: Tensor) -> float:
    return float((k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()).norm())


def participation_ratio(Z: Any) -> float:
    """Dimension $(\\operatorname{tr} C)^2 / \\operatorname{tr} C^2$ of responses `[N, M]` with covariance C; NaN for constant ones."""
    z = finite("Z", torch.as_tensor(Z)).detach().double().flatten(1)
    if not len(z):
        raise ValueError("expected responses [N, M] to at least one input, got none")
    z = z - z.mean(0)
    # tr C^2 by the smaller of the two Gram matrices.
    gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z
    return float(gram.trace() ** 2 / gram.square().sum()) if float(gram.trace()) > 0 else math.nan


def geometry(
    module: nn.Module, layers: Sequence[str], inputs: Tensor, conditions: Tensor, labels: Tensor, *, seed: int = 0
) -> pd.DataFrame:
    """All measures for the layers of a network.

    Args:
        module: network; it is left as it was.
        layers: names of modules.
        inputs: `[N, ...]`.
        conditions: 0 to P - 1, `[N]`.
        labels: labels of the conditions: 0 or 1 `[P]`, or several columns `[P, O]`.
        seed: seed of classifiers and halves.

    Returns:
        A row for the inputs and for each layer: `input_alignment`, `target_alignment`, `parallelism`, `ccgp`,
        `decoding` (mean over the balanced dichotomies), `participation_ratio` (of condition means) and `active` (share
        of units above 0). The dichotomy of parallelism and CCGP is the first column of labels; NaN where it is not
        balanced, or there are too few or too many conditions.
    """
    import pandas as pd

    y = torch.as_tensor(labels, dtype=torch.float64)
    y = y[:, None] if y.dim() == 1 else y
    x_means = condition_means(inputs, conditions)
    if len(y) != len(x_means):
        raise ValueError(f"expected labels of {len(x_means)} conditions, got {len(y)}")
    signs = 2 * y - 1
    K_x, K_y = x_means @ x_means.T, signs @ signs.T
    features = {"inputs": inputs, **collect_features(module, inputs, list(layers), flatten="all")}
    P = len(y)
    split = y[:, 0].numpy() > 0.5
    fair = 2 * split.sum() == P
    every = dichotomies(P) if P % 2 == 0 and P <= EXACT else np.zeros((0, P), dtype=bool)
    rows = []
    for name, z in features.items():
        means = condition_means(z, conditions)
        K_z = means @ means.T
        pairing = "exact" if P <= EXACT else "assignment"
        decoded = [decoding_accuracy(z, conditions, d, seed=seed) for d in every]
        rows.append(
            {
                "layer": name,
                "input_alignment": kernel_alignment(K_z, K_x),
                "target_alignment": kernel_alignment(K_z, K_y),
                "parallelism": parallelism_score(means, split, pairing) if fair else math.nan,
                "ccgp": ccgp(z, conditions, split, seed=seed) if min(split.sum(), P - split.sum()) > 1 else math.nan,
                "decoding": float(np.mean(decoded)) if decoded else math.nan,
                "participation_ratio": participation_ratio(means),
                "active": float((z > 0).double().mean()),
            }
        )
    return pd.DataFrame(rows).set_index("layer")


class Geometry(Analysis):
    """Whether the layers of a classifier mirror its inputs or its labels: what `inspect` shows."""

    def look(self, *models: nn.Module, data: Examples, layers: Sequence[str] = (), seed: int = 0) -> Panel:
        import matplotlib.pyplot as plt

        x, y = torch.cat([row[0] for row in data.batches()]), data.labels
        present = torch.unique(y) if y is not None else torch.zeros(0)
        if y is None or len(present) < 3 or not x.is_floating_point():
            raise ValueError(
                "Whether it mirrors inputs or labels is not shown: it needs labels of three classes or more."
            )
        conditions = torch.searchsorted(present, y)
        names = list(layers) or [n for n, m in models[0].named_modules() if n and not list(m.children())][-12:]
        targets = torch.eye(len(present), dtype=torch.float64)
        signs, x_means = 2 * targets - 1, condition_means(x, conditions)
        kernels = x_means @ x_means.T, signs @ signs.T
        rows = {}
        for name, z in {"inputs": x, **collect_features(models[0], x, names)}.items():
            means = condition_means(z, conditions)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                alignments = [kernel_alignment(means @ means.T, k) for k in kernels]
            rows[name] = {"input alignment": alignments[0], "label alignment": alignments[1],
                          "participation ratio": participation_ratio(means), "active": float((z > 0).double().mean())}  # fmt: skip
        import pandas as pd

        table = pd.DataFrame(rows).T
        table.index.name = "layer"
        fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        for column in ("input alignment", "label alignment"):
            ax.plot(range(len(table)), table[column], marker=".", label=column)
        ax.set_xticks(range(len(table)), list(table.index), rotation=45, ha="right")
        ax.set(ylim=(0, 1.02), ylabel="centred kernel alignment")
        ax.legend()
        last, between_both = table.iloc[-1], kernel_alignment(*kernels)
        sentences = [
            f"Mean responses of {len(present)} classes are compared with the mean inputs and with the labels by the "
            f"alignment of their kernels (1: the same geometry). Inputs and labels themselves have {between_both:.2f}; the "
            f"last layer shown has {last['input alignment']:.2f} with the inputs and {last['label alignment']:.2f} with the "
            "labels.",
            "A participation ratio near the number of classes less one means that the classes spread in all directions, "
            "one near 1 that they lie on a line.",
        ]
        notes = ["Alignments over fewer than some six classes are coarse."] if len(present) < 6 else []
        record = {"between": between_both, "layers": [{"layer": n, **r} for n, r in rows.items()]}
        return Panel("Does it mirror its inputs or its labels?", sentences, notes, [table],
                     [(fig, "Alignment with inputs and labels, by layer.")], record,
                     f"representational geometry, {len(y):,} examples")  # fmt: skip
