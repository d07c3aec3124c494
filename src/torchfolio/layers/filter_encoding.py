"""Features of frozen filters, and banks compared by them.

Reference:
    Encoders: Coates, Ng and Lee, An Analysis of Single-Layer Networks in Unsupervised Feature Learning, 2011.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import images, labels, one_of, same_length
from torchfolio.layers.bundled import ridge_solution
from torchfolio.layers.filter_banks import Bank
from torchfolio.layers.patches import Whitening, draw_patches, normalize_patches

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Encoder", "as_images", "as_labels", "bench", "correlations", "encode", "redundancy"]

Encoder = Literal["linear", "relu", "split", "triangle"]
"""What is done to the responses of filters."""
_BATCH = 500


def as_images(X: Any) -> Tensor:
    """Images `[N, C, H, W]` in float32 on the CPU; whole numbers are divided by 255."""
    x = torch.as_tensor(np.asarray(X) if not isinstance(X, Tensor) else X).detach().cpu()
    x = x.float() if x.is_floating_point() else x.float() / 255
    return images(x, name="X")


def as_labels(y: Any) -> Tensor:
    """Labels `[N]` of a tensor, an array or a list."""
    return torch.as_tensor(labels(y if isinstance(y, Tensor) else np.asarray(y)))


@torch.no_grad()
def encode(bank: Bank, X: Tensor, encoder: Encoder = "split", *, alpha: float = 0.25, cells: int = 2) -> Tensor:
    """Pooled features `[N, K, parts, cells, cells]` of frozen filters; see `bench` for the encoders."""
    one_of("encoder", encoder, ("linear", "relu", "split", "triangle"))
    if X.shape[1] != bank.filters.shape[1] or min(X.shape[2:]) < bank.size:
        raise ValueError(
            f"expected images [N, {bank.filters.shape[1]}, at least {bank.size}, ...], got {list(X.shape)}"
        )
    layer = bank.as_patch_norm_conv(trainable=False)
    lengths = None
    if encoder == "triangle":
        d = bank.filters[0].numel()
        whole_space = Bank(torch.eye(d).view(d, *bank.filters.shape[1:]), "identity", bank.whitening)
        lengths = whole_space.as_patch_norm_conv(trainable=False)
    parts = []
    for x in X.split(_BATCH):
        s = layer(x)
        if encoder == "split":
            # max(s - a, 0) and max(-s - a, 0) by one shrinkage: what is left is one or the other.
            left = F.softshrink(s, alpha)
            both = torch.stack([F.adaptive_avg_pool2d(left, cells), F.adaptive_avg_pool2d(left.abs(), cells)], 2)
            parts.append(torch.stack([both[:, :, 1] + both[:, :, 0], both[:, :, 1] - both[:, :, 0]], 2) / 2)
            continue
        if lengths is not None:
            square = lengths(x).square().sum(1, keepdim=True) + bank.filters.flatten(1).square().sum(1)[:, None, None]
            z = (square - 2 * s).clamp(min=0).sqrt()
            s = (z.mean(1, keepdim=True) - z).relu()
        s = s.relu() if encoder == "relu" else s
        parts.append(F.adaptive_avg_pool2d(s, cells)[:, :, None])
    return torch.cat(parts)


def bench(
    banks: Bank | Iterable[Bank],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    encoder: Encoder = "split",
    *,
    whiten: bool = True,
    seed: int = 0,
) -> DataFrame:
    """Accuracy of a ridge classifier on frozen filters, pooled to 2 x 2 quadrants, with the banks' redundancy.

    The penalty is chosen on a fifth of the training examples.

    Args:
        banks: one or several; those without whitening get that of the training images.
        train: images `[N, C, H, W]` and labels `[N]`.
        test: test data, likewise.
        encoder: `"linear"` s; `"relu"` max(s, 0); `"split"` max(s - 0.25, 0) and max(-s - 0.25, 0); `"triangle"`
            how much nearer than the mean the filter is.
        whiten: whether banks without whitening get one; else they are taken as they are.
        seed: seed of the patches and of the part held out.

    Returns:
        A row for every bank: name, filters, size, accuracy (percent), redundancy, seconds.
    """
    import pandas as pd

    (X, y), (X_test, y_test) = ((as_images(x), as_labels(t)) for x, t in (train, test))
    same_length(X=X, y=y)
    same_length(X=X_test, y=y_test)
    rows = []
    for bank in [banks] if isinstance(banks, Bank) else banks:
        start = time.perf_counter()
        if bank.whitening is None and whiten:
            patches = normalize_patches(draw_patches(X, bank.size, 20_000, seed=seed))
            bank = Bank(bank.filters, bank.name, Whitening.fit(patches), bank.meta)
        features, features_test = (encode(bank, x, encoder).flatten(1) for x in (X, X_test))
        accuracy = _ridge_accuracy(features, y, features_test, y_test, seed)
        rows.append({"bank": bank.name, "filters": len(bank), "size": bank.size, "accuracy": accuracy,
                     "redundancy": redundancy(bank), "seconds": time.perf_counter() - start})  # fmt: skip
    if not rows:
        raise ValueError("expected at least one bank, got none")
    return pd.DataFrame(rows)


def _ridge_accuracy(Z: Tensor, y: Tensor, Z_test: Tensor, y_test: Tensor, seed: int) -> float:
    """Accuracy in percent; the penalty is chosen on a fifth of the training examples."""
    order = torch.randperm(len(Z), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(Z) // 5], order[len(Z) // 5 :]
    if not len(held):
        raise ValueError(f"expected at least 5 training examples, got {len(Z)}")
    mean, std = Z[rest].mean(0), Z[rest].std(0)
    scale = torch.where(std > 1e-8, 1 / std.clamp(min=1e-8), 0)
    Z, Z_test = (Z - mean) * scale, (Z_test - mean) * scale
    Y = F.one_hot(y, int(max(y.max(), y_test.max())) + 1).double()

    def score(part: Tensor, alpha: float, inputs: Tensor, targets: Tensor) -> float:
        A, a = ridge_solution(Z[part], Y[part], alpha)
        return float(((inputs.double() @ A.mT + a).argmax(1) == targets).double().mean())

    penalties = [len(Z) * 10.0**p for p in (-4, -3, -2.5, -2, -1.5, -1, -0.5, 0)]
    best = max(penalties, key=lambda alpha: score(rest, alpha, Z[held], y[held]))
    return 100 * score(order, best, Z_test, y_test)


@torch.no_grad()
def redundancy(bank: Bank) -> float:
    """Mean over filters of the largest normalised cross-correlation with any other filter over all shifts, 0 to 1."""
    return float(correlations(bank).amax(1).mean()) if len(bank) > 1 else 0.0


def correlations(bank: Bank) -> Tensor:
    """Largest normalised cross-correlation of two filters over all shifts, `[K, K]`; 0 on the diagonal."""
    unit = F.normalize(bank.filters.flatten(1), dim=1).view_as(bank.filters)
    largest = F.conv2d(unit, unit, padding=bank.size - 1).abs().amax((2, 3))
    return largest.fill_diagonal_(0)
