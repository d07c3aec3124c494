"""Plug-in estimates of the information in activations, in bits, from bins that follow the layer or from fixed ones.

Reference:
    Chelombiev, Houghton, O'Donnell, ICLR 2019 (arXiv 1902.09037), Section 3.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from torchfolio.checks import finite, number, whole

__all__ = [
    "SATURATED",
    "AdaptiveBinning",
    "Estimator",
    "FixedBinning",
    "Information",
    "checked",
    "discrete_mi",
    "joint_entropy",
    "permuted_label_information",
]

SATURATED = 0.1
"""Bits below log2 N from which on an estimate says nothing."""


class Information(NamedTuple):
    """Information of a layer in bits; `i_ty` is NaN without labels."""

    i_xt: float
    i_ty: float


class Estimator(Protocol):
    """From activations `[N, d]`, and labels `[N]`, to `Information`."""

    def __call__(
        self, activations: Tensor, labels: Tensor | None = None, inputs: Tensor | None = None
    ) -> Information: ...


def joint_entropy(codes: Tensor) -> float:
    """Plug-in entropy of the rows of `codes`, integers `[N, d]`, each row being one symbol: $-\\sum_t p(t) \\log_2 p(t)$."""
    return _entropy(_symbols(codes))


def discrete_mi(codes: Tensor, labels: Tensor) -> float:
    """$I(T;Y) = H(T) - \\sum_y p(y) H(T \\mid Y = y)$ of symbols `[N, d]` and labels `[N]`.

    The plug-in estimate is too large by up to (symbols - 1)(classes - 1) / (2 N ln 2) bits; see
    `permuted_label_information`.
    """
    labels = torch.as_tensor(labels)
    if labels.shape != (len(codes),):
        raise ValueError(f"expected a label for each of {len(codes)} rows, got shape {tuple(labels.shape)}")
    symbols = _symbols(codes)
    return max(0.0, _entropy(symbols) - _conditional(symbols, _symbols(labels[:, None])))


def _symbols(codes: Tensor) -> np.ndarray:
    """A number for every distinct row, `[N]`."""
    codes = torch.as_tensor(codes)
    if codes.dim() != 2 or codes.is_floating_point() or not len(codes):
        raise ValueError(f"expected integer codes [N, d], got {codes.dtype} of shape {tuple(codes.shape)}")
    columns = codes.detach().cpu().numpy().astype(np.int64)
    columns = columns - columns.min(0)
    symbols = np.zeros(len(columns), np.int64)
    count = 1
    # As many columns at a time as one integer holds; what they have in common is renumbered, so nothing collides.
    for column in columns.T:
        base = int(column.max()) + 1
        if count * base >= 2**62:
            symbols = np.unique(symbols, return_inverse=True)[1]
            count = int(symbols.max()) + 1
        symbols, count = symbols * base + column, count * base
    return np.unique(symbols, return_inverse=True)[1]


def _entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    p = counts[counts > 0] / len(symbols)
    return float(max(0.0, -(p * np.log2(p)).sum()))


def _conditional(symbols: np.ndarray, given: np.ndarray) -> float:
    """$H(T \\mid G)$ from numbers of both."""
    joint = np.unique(symbols.astype(np.int64) * (int(given.max()) + 1) + given, return_inverse=True)[1]
    return _entropy(joint) - _entropy(given)


class _Discrete(ABC):
    """What estimators that give every activation a code have in common."""

    @abstractmethod
    def codes(self, activations: Tensor) -> Tensor:
        """Codes int64 `[N, d]` of activations `[N, d]`."""

    def __call__(self, activations: Tensor, labels: Tensor | None = None, inputs: Tensor | None = None) -> Information:
        """Information of one layer.

        Args:
            activations: `[N, d]`, of equally likely inputs.
            labels: `[N]` integers.
            inputs: `[N, ...]`; needed only if some are repeated, to subtract $H(T \\mid X)$ of a layer that is not a
                function of them.
        """
        labels = None if labels is None else torch.as_tensor(labels)
        symbols = _symbols(self.codes(checked(activations, labels)))
        entropy = _entropy(symbols)
        if entropy > math.log2(len(symbols)) - SATURATED:
            warnings.warn(
                f"almost all of {len(symbols)} inputs have a symbol of their own ({entropy:.2f} bits of "
                f"{math.log2(len(symbols)):.2f}): the estimate says nothing about this layer; take fewer bins, more inputs, "
                "or the kernel estimate",
                stacklevel=2,
            )
        i_xt = entropy
        if inputs is not None:
            i_xt -= _conditional(
                symbols,
                np.unique(torch.as_tensor(inputs).flatten(1).cpu().numpy(), axis=0, return_inverse=True)[1].ravel(),
            )
        if labels is None:
            return Information(i_xt, math.nan)
        return Information(i_xt, max(0.0, entropy - _conditional(symbols, _symbols(labels.long()[:, None]))))


class AdaptiveBinning(_Discrete):
    """Entropy-based adaptive binning: equally many of the layer's distinct values in every bin.

    With the $n$ distinct values $u$ of the layer, sorted and without the atom, the bins begin at
    $e_k = u_{\\lfloor k n / B \\rfloor}$, $k = 0, \\dots, B - 1$; the code of $a$ is the number of $e_k \\le a$, so that the atom
    has code 0. Codes do not change under any increasing map of the layer.

    Args:
        n_bins: $B$; 30.
        atom: value of inactive units, the smallest there is: `"auto"` takes 0 where the layer's minimum is 0 and more
            than one activation has it; `None` takes none.
        per_neuron: bins of their own for every unit.
        official_top_bin: whether to let the largest value be a bin of its own, as in the authors' code.

    Reference:
        Section 3 and the authors' code (bins recomputed for every layer at every moment, shared by its units).
    """

    def __init__(
        self,
        n_bins: int = 30,
        atom: float | Literal["auto"] | None = "auto",
        per_neuron: bool = False,
        official_top_bin: bool = False,
    ) -> None:
        self.n_bins, self.atom, self.per_neuron, self.official_top_bin = (
            whole("n_bins", n_bins, 2),
            atom,
            per_neuron,
            official_top_bin,
        )

    def codes(self, activations: Tensor) -> Tensor:
        values = checked(activations, None).cpu().numpy() + 0.0  # -0.0 and 0.0 are one value
        if self.per_neuron:
            return torch.from_numpy(np.stack([self._code(column) for column in values.T], 1))
        return torch.from_numpy(self._code(values))

    def _code(self, values: np.ndarray) -> np.ndarray:
        distinct = np.unique(values)
        atom = self.atom
        if atom == "auto":
            atom = 0.0 if distinct[0] == 0 and (values == 0).sum() > 1 else None
        if atom is not None:
            distinct = distinct[distinct != atom]
        if not len(distinct):
            return np.zeros(values.shape, np.int64)
        edges = distinct[np.arange(self.n_bins) * len(distinct) // self.n_bins]
        if self.official_top_bin:
            edges = np.append(edges, distinct[-1])
        return np.searchsorted(edges, values, side="right").astype(np.int64)

    def __repr__(self) -> str:
        return f"AdaptiveBinning(n_bins={self.n_bins})"


class FixedBinning(_Discrete):
    """Bins of equal width on a range that does not follow the layer; values beyond go to the bins at the ends.

    Args:
        n_bins: number of bins.
        low: lower end; -1 for tanh, 0 for ReLU.
        high: upper end; 1 for tanh, the maximum over all layers and epochs for others.
    """

    def __init__(self, n_bins: int = 30, low: float = -1.0, high: float = 1.0) -> None:
        self.n_bins = whole("n_bins", n_bins, 2)
        if not finite("low", number("low", low)) < finite("high", number("high", high)):
            raise ValueError(f"expected low < high, got {low} and {high}")
        self.low, self.high = low, high

    def codes(self, activations: Tensor) -> Tensor:
        place = (checked(activations, None).double() - self.low) / (self.high - self.low)
        return (place * self.n_bins).floor().clamp(0, self.n_bins - 1).long().cpu()

    def __repr__(self) -> str:
        return f"FixedBinning(n_bins={self.n_bins}, low={self.low:g}, high={self.high:g})"


def permuted_label_information(
    estimator: Estimator, activations: Tensor, labels: Tensor, repeats: int = 20, seed: int = 0
) -> tuple[float, float]:
    """What an estimator finds of $I(T;Y)$ where there is none: mean and deviation over shuffled labels."""
    generator, labels = torch.Generator().manual_seed(seed), torch.as_tensor(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        values = [
            estimator(activations, labels[torch.randperm(len(labels), generator=generator)]).i_ty
            for _ in range(repeats)
        ]
    return float(np.mean(values)), float(np.std(values))


def checked(activations: Tensor, labels: Tensor | None) -> Tensor:
    """Activations `[N, d]` apart from their graph, in a type that NumPy has.

    Raises:
        ValueError: unless they are finite rows of at least 2 inputs, with a whole label for each where there are labels.
    """
    activations = torch.as_tensor(activations)
    if activations.dim() != 2:
        raise ValueError(f"expected activations [N, d], got shape {tuple(activations.shape)}")
    if len(activations) < 2:
        raise ValueError(f"expected at least 2 inputs, got {len(activations)}")
    if not bool(activations.isfinite().all()):
        raise ValueError("the activations hold NaN or infinite values")
    if labels is not None and (labels.shape != (len(activations),) or labels.is_floating_point()):
        raise ValueError(
            f"expected integer labels [{len(activations)}], got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    activations = activations.detach()
    return activations.float() if activations.dtype.itemsize < 4 else activations  # numpy has no bfloat16
