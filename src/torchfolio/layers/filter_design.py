"""Designing the filters of convolution layers: initialise, learn without labels, choose, count, compare.

`init_` fills layers by a scheme or from a bank; `FilterLearner` learns a bank from images; `select_filters`,
`filter_count` and `filter_size_report` say which, how many and how large; `bench` compares banks on frozen features.

This is the one door; the parts are `filter_banks`, `filter_init`, `filter_learning`,
`filter_networks`, `filter_encoding`, `filter_choice`.

Reference:
    Hirani and Abdulla, On filter design in deep convolutional neural network, arXiv 2410.21644 (a survey). Sources of the
    methods stand in the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import between, one_of, positive, whole
from torchfolio.layers import filter_learning as learning
from torchfolio.layers import filter_networks as networks
from torchfolio.layers.filter_banks import Bank, PatchNormConv2d, dct_bank, gabor_bank, random_bank, wavelet_bank
from torchfolio.layers.filter_choice import filter_count, marchenko_pastur_count, select_filters
from torchfolio.layers.filter_encoding import Encoder, as_images, as_labels, bench, encode, redundancy
from torchfolio.layers.filter_init import SCHEMES, init_
from torchfolio.layers.patches import Whitening, draw_patches, normalize_patches

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "KNOWN_PLANS", "METHODS", "SCHEMES", "Bank", "FilterLearner", "PatchNormConv2d", "bench", "dct_bank", "encode",
    "filter_count", "filter_size_report", "gabor_bank", "init_", "marchenko_pastur_count", "random_bank",
    "receptive_field", "redundancy", "select_filters", "wavelet_bank",
]  # fmt: skip

METHODS: dict[str, type[learning.Learner]] = {
    "random_patches": learning.RandomPatches, "pca": learning.PCA, "ica": learning.ICA, "kmeans": learning.KMeans,
    "spherical_kmeans": learning.SphericalKMeans, "conv_kmeans": learning.ConvKMeans,
    "sparse_coding": learning.SparseCoding, "hebbian": networks.Hebbian, "wta": networks.WTA,
    "soft_wta": networks.SoftWTA, "som": networks.SOM, "autoencoder": networks.Autoencoder,
    "conv_wta": networks.ConvWTA, "rotations": networks.Rotations,
}  # fmt: skip
"""Ways to learn filters, by the name that `FilterLearner` takes."""

KNOWN_PLANS: dict[str, tuple[tuple[int, int], ...]] = {
    "LeNet-5": ((5, 6), (5, 16), (5, 120)),
    "AlexNet": ((11, 96), (5, 256), (3, 384), (3, 384), (3, 256)),
    "VGG-16": ((3, 64),) * 2 + ((3, 128),) * 2 + ((3, 256),) * 3 + ((3, 512),) * 6,
    "ResNet-18": ((7, 64),) + ((3, 64),) * 4 + ((3, 128),) * 4 + ((3, 256),) * 4 + ((3, 512),) * 4,
}
"""Side and number of the filters of known networks, layer by layer."""


class FilterLearner(TransformerMixin, BaseEstimator):
    """Learns a bank of filters from unlabelled images, and gives pooled features.

    Args:
        method: a name of `METHODS`, or a `Learner` with its settings.
        n_filters: number of filters K; at most $Ck^2$ for PCA, ICA and Sanger's rule.
        size: side k of the filters.
        whiten: whether patches are whitened (ZCA); else they are only normalised.
        n_patches: number of patches drawn.
        epsilon: constant of the whitening.
        contrast: constant of the contrast normalisation, above 0; 0.01 suits images in [0, 1].
        drop_blank: whether nearly constant patches are left out.
        encoder: encoder, see `bench`.
        random_state: seed.

    Attributes:
        bank_: bank, with its whitening; `as_conv`, `as_patch_norm_conv` and `plot` are its own.
        filters_: `[K, C, k, k]` array.
        whitening_: matrix and mean of the whitening, or `None`.

    Raises:
        ValueError: in `fit`, for settings out of range, too small images, or images that are constant.

    Example:
        >>> X = torch.rand(50, 1, 12, 12)
        >>> FilterLearner("pca", n_filters=8, random_state=0).fit_transform(X).shape
        (50, 64)
    """

    bank_: Bank

    def __init__(
        self,
        method: str | learning.Learner = "kmeans",
        n_filters: int = 64,
        size: int = 5,
        whiten: bool = True,
        n_patches: int = 20_000,
        epsilon: float = 0.1,
        contrast: float = 0.01,
        drop_blank: bool = True,
        encoder: Encoder = "split",
        random_state: Any = None,
    ) -> None:
        self.method = method
        self.n_filters = n_filters
        self.size = size
        self.whiten = whiten
        self.n_patches = n_patches
        self.epsilon = epsilon
        self.contrast = contrast
        self.drop_blank = drop_blank
        self.encoder: Encoder = encoder
        self.random_state = random_state

    @torch.no_grad()
    def fit(self, X: Any, y: Any = None):
        """Learn from images `[N, C, H, W]`, tensor or array."""
        x = as_images(X)
        positive("contrast", self.contrast)
        one_of("encoder", self.encoder, get_args(Encoder))
        K, k, C = whole("n_filters", self.n_filters, 1), whole("size", self.size, 1), x.shape[1]
        learner: Any = self.method
        if isinstance(learner, str):
            kind = METHODS[one_of("method", learner, METHODS)]
            learner = kind(size=k) if kind.source == "images" else kind()  # pyright: ignore[reportCallIssue]
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        patches = draw_patches(x, k, self.n_patches, drop_blank=self.drop_blank, generator=generator)
        normal = normalize_patches(patches, self.contrast)
        d = patches.shape[1]
        if self.whiten:
            whitening = Whitening.fit(normal, self.epsilon, self.contrast)
        else:
            whitening = Whitening(torch.eye(d), torch.zeros(d), self.contrast)
        if learner.source == "images":
            if x.shape[2] != x.shape[3]:
                raise ValueError(f"expected square images, got {x.shape[2]}x{x.shape[3]}")
            filters, whitening = learner.learn(x, K, generator), None
            filters = F.normalize(filters.flatten(1), dim=1).view_as(filters)
        elif learner.source == "windows":
            side = min(2 * k, *x.shape[2:])
            count = max(K, self.n_patches // 10)
            windows = draw_patches(x, side, count, drop_blank=self.drop_blank, generator=generator)
            shifted = F.unfold(windows.view(-1, C, side, side), k).mT
            filters = learner.learn(whitening(shifted), K, generator)
        else:
            filters = learner.learn((normal - whitening.mean) @ whitening.matrix.mT, K, generator)
        name = self.method if isinstance(self.method, str) else type(learner).__name__
        self.bank_ = Bank(filters.view(K, C, k, k), name, whitening, {"n_patches": len(patches)})
        return self

    @property
    def filters_(self) -> NDArray[np.float32]:
        check_is_fitted(self, "bank_")
        return self.bank_.filters.numpy()

    @property
    def whitening_(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        check_is_fitted(self, "bank_")
        own = self.bank_.whitening
        return None if own is None else (own.matrix.numpy(), own.mean.numpy())

    def as_conv(self, *args: Any, **kwargs: Any) -> nn.Conv2d:
        """See `Bank.as_conv`."""
        check_is_fitted(self, "bank_")
        return self.bank_.as_conv(*args, **kwargs)

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Features of images, pooled to 2 x 2 quadrants: `[N, 8K]` for `"split"`, else `[N, 4K]`."""
        check_is_fitted(self, "bank_")
        return encode(self.bank_, as_images(X), self.encoder).flatten(1).numpy()


def filter_size_report(
    X: Tensor,
    y: Tensor | None = None,
    sizes: Sequence[int] = (3, 5, 7),
    *,
    n_filters: int = 24,
    method: str | learning.Learner = "kmeans",
    test_share: float = 0.25,
    seed: int = 0,
) -> DataFrame:
    """What speaks for each side of filters: a table, not one answer.

    Args:
        X: images.
        y: labels; with them there is an accuracy on a part held out.
        sizes: candidates.
        n_filters: number of filters that are learned.
        method: method, see `FilterLearner`.
        test_share: share of the images held out, in (0, 1).
        seed: seed of everything drawn.

    Returns:
        A row for every size: `filter_count`, `border` (share of the filters' energy in their outermost ring; 8 of 9
        numbers are there at size 3), `border_of_noise` (that of white filters), and `accuracy` in percent.
    """
    import pandas as pd

    X = as_images(X)
    between("test_share", test_share, 0, 1, inclusive=False)
    if not sizes:
        raise ValueError("expected at least one size, got none")
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    test, train = order[: round(test_share * len(X))], order[round(test_share * len(X)) :]
    rows = []
    for size in sizes:
        bank = FilterLearner(method, n_filters, size, random_state=seed).fit(X[train]).bank_
        energy = bank.filters.square().sum((0, 1))
        inner = energy[1:-1, 1:-1].sum() if size > 2 else torch.tensor(0.0)
        row = {"size": size, **filter_count(X[train], size, seed=seed), "border": float(1 - inner / energy.sum()),
               "border_of_noise": 1 - max(size - 2, 0) ** 2 / size**2}  # fmt: skip
        if y is not None:
            targets = as_labels(y)
            table = bench(bank, (X[train], targets[train]), (X[test], targets[test]), seed=seed)
            row["accuracy"] = float(table["accuracy"].iloc[0])
        rows.append(row)
    return pd.DataFrame(rows)


def receptive_field(model: nn.Module) -> list[tuple[str, int, int]]:
    """Name, receptive field and stride in the input of every convolution and pooling, in the order of the modules.

    The network is taken as a chain; in a residual one this is the field of its longest branch, if branches beside it
    have filters of side 1.
    """
    kinds = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d
    field, stride, fields = 1, 1, []
    for name, layer in model.named_modules():
        if not isinstance(layer, kinds):
            continue
        side, step, dilation = (_first(getattr(layer, key, 1)) for key in ("kernel_size", "stride", "dilation"))
        if (side == 1 and "downsample" in name) or "shortcut" in name:
            continue
        field += (side - 1) * dilation * stride
        stride *= step
        fields.append((name, field, stride))
    if not fields:
        raise ValueError("expected a model with convolutions, got none")
    return fields


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)
