"""Whether a representation codes variables of its conditions abstractly: parallelism, generalisation, decoding.

A dichotomy splits P conditions in two. It is coded abstractly where the steps from one side to the other are parallel, and
where a linear classifier that saw some of the conditions tells the others apart.

Reference:
    Bernardi et al., The Geometry of Abstraction in the Hippocampus and Prefrontal Cortex, Cell 2020.
"""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.checks import finite, one_of, same_length

__all__ = ["EXACT", "ccgp", "condition_means", "decoding_accuracy", "dichotomies", "parallelism_score"]

MOST_SPLITS = 50  # of CCGP; more are drawn at random
EXACT = 8
"""Number of conditions up to which all pairings are tried."""


def condition_means(Z: Any, conditions: Any) -> Tensor:
    """Mean responses by condition, float64 `[P, M]`.

    Args:
        Z: responses `[N, ...]`, flattened.
        conditions: 0 to P - 1, `[N]`; each at least once.
    """
    z, c = torch.as_tensor(Z).detach().double().flatten(1).cpu(), counted(conditions)
    same_length(Z=z, conditions=c)
    finite("Z", z)
    counts = torch.bincount(c)
    return torch.zeros(len(counts), z.shape[1], dtype=z.dtype).index_add_(0, c, z) / counts[:, None]


def counted(conditions: Any) -> Tensor:
    """Conditions as int64 `[N]` on the CPU.

    Raises:
        ValueError: unless they are whole numbers from 0 on, each at least once.
    """
    c = torch.as_tensor(conditions).detach().cpu()
    if c.dim() != 1 or not len(c) or c.is_floating_point() or c.dtype == torch.bool or int(c.min()) < 0:
        raise ValueError(f"expected conditions [N], whole numbers from 0 on, got {c.dtype} of shape {tuple(c.shape)}")
    counts = torch.bincount(c.long())
    if bool((counts == 0).any()):
        raise ValueError(f"expected samples of every condition, got none of {int((counts == 0).nonzero()[0])}")
    return c.long()


def dichotomies(P: int, balanced: bool = True) -> np.ndarray:
    """All ways to split P conditions in two, up to sign: bool `[K, P]`, True for the side of condition 0.

    Args:
        P: number of conditions.
        balanced: whether both sides are equally large; P is even then.
    """
    if P < 2 or (balanced and P % 2):
        raise ValueError(f"expected at least two conditions, an even number for balanced dichotomies, got {P}")
    sizes = [P // 2] if balanced else range(1, P)
    rows = [(0, *rest) for size in sizes for rest in combinations(range(1, P), size - 1)]
    splits = np.zeros((len(rows), P), dtype=bool)
    for k, members in enumerate(rows):
        splits[k, list(members)] = True
    return splits


def _dichotomy(dichotomy: Any, P: int, balanced: bool) -> np.ndarray:
    split = np.asarray(dichotomy).astype(bool).ravel()
    if len(split) != P or not 0 < split.sum() < P or (balanced and 2 * split.sum() != P):
        kind = "balanced dichotomy" if balanced else "dichotomy"
        raise ValueError(f"expected a {kind} of {P} conditions, got {np.asarray(dichotomy).tolist()}")
    return split


def parallelism_score(Z: Any, dichotomy: Any, pairing: str = "exact") -> float:
    """Largest mean cosine between the vectors that lead from one side of a dichotomy to the other, over all pairings.

    Args:
        Z: mean responses of the conditions `[P, M]`.
        dichotomy: bool `[P]`, balanced.
        pairing: `"exact"` tries all pairings (P up to 8); `"assignment"` takes the one of least distance, an
            approximation for more.

    Returns:
        1 where the vectors are parallel; for two conditions, which have one vector, 1.
    """
    one_of("pairing", pairing, ("exact", "assignment"))
    z = finite("Z", np.asarray(torch.as_tensor(Z).detach().double().cpu()))
    split = _dichotomy(dichotomy, len(z), balanced=True)
    high, low = z[split], z[~split]
    count = len(high)
    if count == 1:
        return 1.0
    if pairing == "exact" and len(z) <= EXACT:
        orders = np.array(list(permutations(range(count))))
    elif pairing == "exact":
        raise ValueError(f"expected at most {EXACT} conditions for all pairings, got {len(z)}; pairing='assignment'")
    else:
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist

        orders = linear_sum_assignment(cdist(high, low))[1][None]
    vectors = high[None] - low[orders]
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors = vectors / np.maximum(lengths, 1e-12)
    grams = vectors @ vectors.transpose(0, 2, 1)
    means = (grams.sum((1, 2)) - np.trace(grams, axis1=1, axis2=2)) / (count * (count - 1))
    return float(means.max())


def ccgp(Z: Any, conditions: Any, dichotomy: Any, estimator: Any = None, *, seed: int = 0) -> float:
    """Cross-condition generalisation: a linear classifier trained on half of both sides, tested on the others.

    The mean over all ways to take half of the conditions of each side, each way round; 50 of them at random where there
    are more.

    Args:
        Z: responses `[N, M]`.
        conditions: `[N]`.
        dichotomy: bool `[P]`, at least two conditions on each side.
        estimator: scikit-learn classifier; `LinearSVC` by default.
        seed: seed of the classifier and of the choice of splits.

    Raises:
        ValueError: if there are fewer than 4 conditions, or fewer than two on a side.
    """
    z, c, P = _checked(Z, conditions)
    split = _dichotomy(dichotomy, P, balanced=False)
    sides = [np.flatnonzero(split), np.flatnonzero(~split)]
    if P < 4 or min(map(len, sides)) < 2:
        raise ValueError(f"expected at least two conditions on each side, got {len(sides[0])} and {len(sides[1])}")
    halves = [list(combinations(side, len(side) // 2)) for side in sides]
    chosen = [(a, b) for a in halves[0] for b in halves[1]]
    if len(chosen) > MOST_SPLITS:
        order = np.random.default_rng(seed).permutation(len(chosen))[:MOST_SPLITS]
        chosen = [chosen[k] for k in order]
    scores = []
    for a, b in chosen:
        train = np.isin(c, [*a, *b])
        model = _classifier(estimator, seed).fit(z[train], split[c[train]])
        scores.append(model.score(z[~train], split[c[~train]]))
    return float(np.mean(scores))


def _checked(Z: Any, conditions: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Responses `[N, M]`, conditions `[N]` and their number."""
    z, c = torch.as_tensor(Z).detach().double().flatten(1).cpu(), counted(conditions)
    same_length(Z=z, conditions=c)
    return np.asarray(finite("Z", z)), np.asarray(c), int(c.max()) + 1


def _classifier(estimator: Any, seed: int) -> Any:
    from sklearn.base import clone
    from sklearn.svm import LinearSVC

    return LinearSVC(C=1.0, random_state=seed) if estimator is None else clone(estimator)


def decoding_accuracy(Z: Any, conditions: Any, dichotomy: Any, estimator: Any = None, *, seed: int = 0) -> float:
    """Accuracy of a linear classifier of a dichotomy, trained on half of the samples and tested on the others.

    Args:
        Z: responses `[N, M]`.
        conditions: `[N]`.
        dichotomy: bool `[P]`.
        estimator: scikit-learn classifier; `LinearSVC` by default.
        seed: seed of the halves.
    """
    z, c, P = _checked(Z, conditions)
    label = _dichotomy(dichotomy, P, balanced=False)[c]
    order = np.random.default_rng(seed).permutation(len(z))
    train, test = order[: len(z) // 2], order[len(z) // 2 :]
    if len(np.unique(label[train])) < 2:
        raise ValueError(f"expected both sides among the half that is trained on, got {len(train)} samples of one")
    return float(_classifier(estimator, seed).fit(z[train], label[train]).score(z[test], label[test]))
