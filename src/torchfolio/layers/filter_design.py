"""Designing the filters of convolution layers: initialise, learn without labels, choose, count, compare.

`init_` fills layers by a scheme or from a bank; `FilterLearner` learns a bank from images; `select_filters`,
`filter_count` and `filter_size_report` say which, how many and how large; `bench` compares banks on frozen features.

Longer than most: it is the one door to banks (`filter_banks`), learning (`filter_learning`) and patches.

Reference:
    Hirani and Abdulla, On filter design in deep convolutional neural network, arXiv 2410.21644 (a survey). LSUV: Mishkin
    and Matas 2016. Encoders: Coates et al. 2011. Choice by joint information is ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, between, finite, images, labels, one_of, same_length, whole
from torchfolio.layers import filter_learning as learning
from torchfolio.layers.bundled import ridge_solution
from torchfolio.layers.filter_banks import Bank, PatchNormConv2d, dct_bank, gabor_bank, random_bank, wavelet_bank
from torchfolio.layers.patches import Whitening, draw_patches, normalize_patches
from torchfolio.measure import untouched

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "KNOWN_PLANS", "METHODS", "Bank", "FilterLearner", "PatchNormConv2d", "bench", "dct_bank", "filter_count",
    "filter_size_report", "gabor_bank", "init_", "marchenko_pastur_count", "random_bank", "receptive_field",
    "redundancy", "select_filters", "wavelet_bank",
]  # fmt: skip

METHODS: dict[str, type[learning.Learner]] = {
    "random_patches": learning.RandomPatches, "pca": learning.PCA, "ica": learning.ICA, "kmeans": learning.KMeans,
    "spherical_kmeans": learning.SphericalKMeans, "conv_kmeans": learning.ConvKMeans,
    "sparse_coding": learning.SparseCoding, "hebbian": learning.Hebbian, "wta": learning.WTA,
    "soft_wta": learning.SoftWTA, "som": learning.SOM, "autoencoder": learning.Autoencoder,
    "conv_wta": learning.ConvWTA, "rotations": learning.Rotations,
}  # fmt: skip
"""Ways to learn filters, by the name that `FilterLearner` takes."""

KNOWN_PLANS: dict[str, tuple[tuple[int, int], ...]] = {
    "LeNet-5": ((5, 6), (5, 16), (5, 120)),
    "AlexNet": ((11, 96), (5, 256), (3, 384), (3, 384), (3, 256)),
    "VGG-16": ((3, 64),) * 2 + ((3, 128),) * 2 + ((3, 256),) * 3 + ((3, 512),) * 6,
    "ResNet-18": ((7, 64),) + ((3, 64),) * 4 + ((3, 128),) * 4 + ((3, 256),) * 4 + ((3, 512),) * 4,
}
"""Side and number of the filters of known networks, layer by layer."""

SCHEMES = ("gaussian", "lecun_1998", "lecun_normal", "xavier", "he", "orthogonal", "delta_orthogonal", "lsuv")
Encoder = Literal["linear", "relu", "split", "triangle"]
_BATCH = 500


# Initialisation


@torch.no_grad()
def init_(
    model: nn.Module,
    scheme: str | Bank,
    *,
    data: Tensor | None = None,
    gain: float = 1.0,
    sigma: float = 0.01,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Fill the weights of all convolutions and linear layers in place; biases become 0 and frozen weights stay.

    With $F_{in} = Ck^2$ and $F_{out} = Kk^2$: `"gaussian"` $N(0, \\sigma^2)$, `"lecun_1998"`
    $U(\\pm 2.4/F_{in})$, `"lecun_normal"` $N(0, 1/F_{in})$, `"xavier"` $U(\\pm\\sqrt{6/(F_{in}+F_{out})})$, `"he"`
    $N(0, 2/F_{in})$, `"orthogonal"` (rows or columns), `"delta_orthogonal"` (orthogonal in the central tap, 0 elsewhere),
    `"lsuv"` (orthogonal, then scaled so that every layer's outputs have variance 1 on `data`).

    Args:
        model: a layer or a network.
        scheme: name, or a bank for one convolution of its shape (or several), whitening folded in.
        data: a batch of inputs for `"lsuv"`.
        gain: factor of (delta-)orthogonal weights.
        sigma: standard deviation of `"gaussian"`.
        generator: generator that is drawn from; torch's global one by default.

    Returns:
        The model.

    Raises:
        ValueError: if there is no such layer or scheme, the bank does not fit, or `"lsuv"` has no data or a layer with
            constant outputs.
    """
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    layers: list[Any] = [m for m in model.modules() if isinstance(m, kinds) and m.weight.requires_grad]
    if isinstance(scheme, Bank):
        layers = [m for m in layers if isinstance(m, nn.Conv2d)]
    if not layers:
        raise ValueError("expected a model with convolutions or linear layers that are trained, got none")
    if isinstance(scheme, Bank):
        weight, bias = scheme.folded()
        if wrong := [m for m in layers if m.weight.shape != weight.shape]:
            raise ValueError(f"expected convolutions of shape {list(weight.shape)}, got {list(wrong[0].weight.shape)}")
        if bias is not None and any(m.bias is None for m in layers):
            raise ValueError("expected convolutions with a bias, which a whitened bank needs, got one without")
    else:
        one_of("scheme", scheme, SCHEMES)
        if scheme == "lsuv" and data is None:
            raise ValueError("expected data for the scheme 'lsuv', got None")
    for layer in layers:
        if layer.bias is not None:
            layer.bias.zero_()
        if isinstance(scheme, Bank):
            layer.weight.copy_(scheme.folded()[0])
            if layer.bias is not None and (bias := scheme.folded()[1]) is not None:
                layer.bias.copy_(bias)
        else:
            _fill(layer.weight, scheme, gain, sigma, generator)
    if scheme == "lsuv" and data is not None:
        _unit_variance(model, layers, data)
    return model


def _fill(weight: Tensor, scheme: str, gain: float, sigma: float, generator: torch.Generator | None) -> None:
    area = weight[0, 0].numel()
    inputs, outputs = weight.shape[1] * area, weight.shape[0] * area
    if scheme in ("lecun_1998", "xavier"):
        bound = 2.4 / inputs if scheme == "lecun_1998" else math.sqrt(6 / (inputs + outputs))
        weight.uniform_(-bound, bound, generator=generator)
    elif scheme in ("gaussian", "lecun_normal", "he"):
        std = {"gaussian": sigma, "lecun_normal": inputs**-0.5, "he": (2 / inputs) ** 0.5}[scheme]
        weight.normal_(0, at_least("sigma", std, 0), generator=generator)
    elif scheme == "delta_orthogonal":
        weight.zero_()
        center = weight[(slice(None), slice(None), *(n // 2 for n in weight.shape[2:]))]
        center.copy_(nn.init.orthogonal_(torch.empty_like(center), gain, generator))
    else:
        nn.init.orthogonal_(weight, gain, generator)


def _unit_variance(model: nn.Module, layers: list[Any], data: Tensor, rounds: int = 10, tol: float = 0.05) -> None:
    """Scale each layer at its turn within one forward pass, so that later ones see the outputs of scaled ones."""
    ran: list[nn.Module] = []
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    with untouched(model, training=False):
        handles: list[Any] = [m.register_forward_hook(lambda m, a, y: ran.append(m)) for m in leaves]
        try:
            model(data)
        finally:
            for handle in handles:
                handle.remove()
    skipped = {id(a) for a, b in zip(ran, ran[1:], strict=False) if isinstance(b, norms)}
    scaled: set[int] = set()
    names = {id(m): n for n, m in model.named_modules()}

    def scale(layer: Any, args: Any, output: Tensor) -> Tensor | None:
        if id(layer) in scaled or id(layer) in skipped:
            return None
        scaled.add(id(layer))
        for _ in range(rounds):
            s2 = float(output.float().var(correction=0))
            if not s2 > 1e-30:
                raise ValueError(f"expected outputs that vary on the data, got constant ones from {names[id(layer)]!r}")
            if abs(s2 - 1) < tol:
                break
            layer.weight.div_(s2**0.5)
            output = type(layer).forward(layer, args[0])
        return output

    modes = {m: m.training for m in model.modules()}
    handles = [layer.register_forward_hook(scale) for layer in layers]
    try:
        model.eval()
        model(data)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


# Learning and encoding


class FilterLearner(TransformerMixin, BaseEstimator):
    """Learns a bank of filters from unlabelled images, and gives pooled features.

    Args:
        method: a name of `METHODS`, or a `Learner` with its settings.
        n_filters: number of filters K; at most $Ck^2$ for PCA, ICA and Sanger's rule.
        size: side k of the filters.
        whiten: whether patches are whitened (ZCA); else they are only normalised.
        n_patches: number of patches drawn.
        epsilon: constant of the whitening.
        contrast: constant of the contrast normalisation; 0.01 suits images in [0, 1].
        drop_blank: whether nearly constant patches are left out.
        encoder: see `bench`.
        random_state: seed.

    Attributes:
        bank_: the bank, with its whitening; `as_conv`, `as_patch_norm_conv` and `plot` are its own.
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
        x = _images(X)
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
        return encode(self.bank_, _images(X), self.encoder).flatten(1).numpy()


def _images(X: Any) -> Tensor:
    x = torch.as_tensor(np.asarray(X) if not isinstance(X, Tensor) else X).detach().cpu()
    x = x.float() if x.is_floating_point() else x.float() / 255
    return images(x, name="X")


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


# Comparing


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
        test: likewise.
        encoder: `"linear"` s; `"relu"` max(s, 0); `"split"` max(s - 0.25, 0) and max(-s - 0.25, 0); `"triangle"`
            how much nearer than the mean the filter is.
        whiten: whether banks without whitening get one; else they are taken as they are.
        seed: seed of the patches and of the part held out.

    Returns:
        A row for every bank: name, filters, size, accuracy (percent), redundancy, seconds.
    """
    import pandas as pd

    (X, y), (X_test, y_test) = ((_images(x), labels(torch.as_tensor(t))) for x, t in (train, test))
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
    return float(_correlations(bank).amax(1).mean()) if len(bank) > 1 else 0.0


def _correlations(bank: Bank) -> Tensor:
    unit = F.normalize(bank.filters.flatten(1), dim=1).view_as(bank.filters)
    largest = F.conv2d(unit, unit, padding=bank.size - 1).abs().amax((2, 3))
    return largest.fill_diagonal_(0)


# Which, how many, how large


@torch.no_grad()
def select_filters(
    bank: Bank,
    X: Tensor,
    y: Tensor | None = None,
    method: Literal["joint", "marginal", "spectral", "redundancy"] = "joint",
    n: int | None = None,
    tol: float = 0.01,
    seed: int = 0,
) -> tuple[list[int], list[float]]:
    """Filters of a bank, best first, and their scores.

    Args:
        bank: the bank.
        X: images.
        y: labels, for `"joint"` and `"marginal"`.
        method: `"joint"`, greedily the largest gain of the Gaussian information of all chosen responses on the label,
            $\\frac12 \\log\\det(\\Sigma_{total} + 0.05 I) - \\frac12 \\log\\det(\\Sigma_{within} + 0.05 I)$;
            `"marginal"`, each filter's own mutual information with the label, which picks near copies;
            `"spectral"`, greedily the most variance that the chosen ones do not explain; `"redundancy"`, greedily the
            least correlated with the chosen ones over all shifts.
        n: number of filters; by default as many as gain `tol` (all for `"marginal"` and `"redundancy"`).
        tol: gain below which choosing ends, where `n` is not given.
        seed: seed of the estimate of `"marginal"`.

    Raises:
        ValueError: if labels are missing, or more filters are asked for than there are.
    """
    one_of("method", method, ("joint", "marginal", "spectral", "redundancy"))
    K = len(bank)
    count = K if n is None else whole("n", n, 1, K)
    if method == "redundancy":
        return _least_correlated(_correlations(bank), count)
    X = _images(X)
    responses = encode(bank, X).sum(2).flatten(2)
    responses = (responses - responses.mean(0)) / responses.std(0).clamp(min=1e-8)
    if method == "spectral":
        return _most_variance(responses.mean(2), count, tol if n is None else None)
    if y is None:
        raise ValueError(f"expected labels for the method {method!r}, got none")
    y = labels(torch.as_tensor(y))
    same_length(X=X, y=y)
    if method == "marginal":
        from sklearn.feature_selection import mutual_info_classif

        scores = mutual_info_classif(responses.mean(2).numpy(), y.numpy(), random_state=seed)
        order = [int(i) for i in np.argsort(-scores, kind="stable")[:count]]
        return order, [float(scores[i]) for i in order]
    return _joint(responses, y, count, tol if n is None else None)


def _joint(responses: Tensor, y: Tensor, count: int, tol: float | None) -> tuple[list[int], list[float]]:
    N, K, g = responses.shape
    flat = responses.flatten(1).double()
    means = torch.zeros(int(y.max()) + 1, flat.shape[1]).double().index_add_(0, y, flat)
    means /= torch.bincount(y).clamp(min=1)[:, None]
    total, within = (v.mT @ v / N + 0.05 * torch.eye(K * g) for v in (flat, flat - means[y]))
    chosen: list[int] = []
    gains: list[float] = []
    reached = 0.0
    while len(chosen) < count:
        rest = [k for k in range(K) if k not in chosen]
        columns = torch.tensor([[*chosen, k] for k in rest])
        index = (columns[..., None] * g + torch.arange(g)).flatten(1)
        blocks = [m[index[:, :, None], index[:, None, :]] for m in (total, within)]
        values = (torch.logdet(blocks[0]) - torch.logdet(blocks[1])) / 2
        best = int(values.argmax())
        gain = float(values[best]) - reached
        if tol is not None and gain < tol:
            break
        chosen.append(rest[best])
        gains.append(gain)
        reached = float(values[best])
    return chosen, gains


def _most_variance(responses: Tensor, count: int, tol: float | None) -> tuple[list[int], list[float]]:
    """Pivoted Cholesky of the responses' covariance; scores are shares of the variance."""
    covariance = torch.cov(responses.double().mT).reshape(responses.shape[1], -1)
    whole_variance = covariance.trace().clamp(min=1e-12)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < count:
        gain = covariance.square().sum(0) / covariance.diagonal().clamp(min=1e-9)
        gain[chosen] = -1
        best = int(gain.argmax())
        share = float(gain[best] / whole_variance)
        if tol is not None and share < tol:
            break
        chosen.append(best)
        gains.append(share)
        column = covariance[:, best] / covariance[best, best].clamp(min=1e-9).sqrt()
        covariance = covariance - torch.outer(column, column)
    return chosen, gains


def _least_correlated(correlations: Tensor, count: int) -> tuple[list[int], list[float]]:
    chosen = [int(correlations.amax(1).argmin())]
    scores = [0.0]
    while len(chosen) < count:
        worst = correlations[chosen].amax(0)
        worst[chosen] = torch.inf
        chosen.append(int(worst.argmin()))
        scores.append(float(worst.min()))
    return chosen, scores


def marchenko_pastur_count(eigenvalues: Tensor, n: int) -> int:
    """How many eigenvalues of a covariance of n samples exceed what noise gives, $\\sigma^2(1 + \\sqrt{d/n})^2$.

    $\\sigma^2$ is the median eigenvalue.
    """
    values = finite("eigenvalues", eigenvalues)
    edge = values.median() * (1 + (len(values) / whole("n", n, 1)) ** 0.5) ** 2
    return int((values > edge).sum())


def filter_count(
    X: Tensor, size: int, *, n_patches: int = 20_000, contrast: float = 0.01, seed: int = 0
) -> dict[str, float]:
    """How many filters the spectrum of normalised patches asks for.

    Args:
        X: images.
        size: side of the filters.
        n_patches: number of patches drawn.
        contrast: see `FilterLearner`.
        seed: seed of the patches.

    Returns:
        `dimension` $Ck^2$; `n_90` and `n_99`, the fewest principal axes with 90 and 99 % of the variance;
        `participation` $(\\sum\\lambda)^2/\\sum\\lambda^2$; `marchenko_pastur`, the axes above noise.
    """
    patches = normalize_patches(draw_patches(_images(X), size, n_patches, seed=seed), contrast)
    values = torch.linalg.eigvalsh(torch.cov(patches.double().mT).reshape(patches.shape[1], -1)).flip(0).clamp(min=0)
    shares = values.cumsum(0) / values.sum()
    return {
        "dimension": len(values),
        "n_90": int((shares < 0.90 - 1e-12).sum()) + 1,
        "n_99": int((shares < 0.99 - 1e-12).sum()) + 1,
        "participation": float(values.sum() ** 2 / values.square().sum()),
        "marchenko_pastur": marchenko_pastur_count(values, len(patches)),
    }


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
        method: see `FilterLearner`.
        test_share: share of the images held out, in (0, 1).
        seed: seed of everything drawn.

    Returns:
        A row for every size: `filter_count`, `border` (share of the filters' energy in their outermost ring; 8 of 9
        numbers are there at size 3), `border_of_noise` (that of white filters), and `accuracy` in percent.
    """
    import pandas as pd

    X = _images(X)
    between("test_share", test_share, 0, 1, inclusive=False)
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
            targets = torch.as_tensor(y)
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
    field, stride, found = 1, 1, []
    for name, layer in model.named_modules():
        if not isinstance(layer, kinds):
            continue
        side, step, dilation = (_first(getattr(layer, key, 1)) for key in ("kernel_size", "stride", "dilation"))
        if (side == 1 and "downsample" in name) or "shortcut" in name:
            continue
        field += (side - 1) * dilation * stride
        stride *= step
        found.append((name, field, stride))
    if not found:
        raise ValueError("expected a model with convolutions, got none")
    return found


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)
