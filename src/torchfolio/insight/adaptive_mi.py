"""Adaptive estimators of mutual information: what a layer's activity tells about the input and about the label.

Ivan Chelombiev, Conor J. Houghton, Cian O'Donnell, "Adaptive Estimators Show Information Compression in Deep Neural
Networks", ICLR 2019, https://arxiv.org/abs/1902.09037.

The information plane shows $I(X;T)$ against $I(T;Y)$ for every layer $T$ while a network trains. In a deterministic network
both depend on how finely activity is looked at. Bins on a fixed range, or noise of a fixed width, mistake the scale of a layer
for information; the estimators here follow the layer's own range at each moment:

- `AdaptiveBinning` (EBAB): bins with equally many of the layer's distinct values;
- `AdaptiveKDE` (aKDE): kernels whose width is a share of the layer's largest activation;
- `FixedBinning`: the baseline.

    recorder = InformationPlaneRecorder(net, ["layer1", "layer2"], x, y, when=log_spaced(40, 1000))
    fit(net, (x, y), epochs=1000, callbacks=[recorder])
    recorder.compression()
    recorder.plot()

All information is in bits.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.insight.activations import layer_name
from torchfolio.measure import untouched
from torchfolio.models import flatten_features, take_features

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "AdaptiveBinning",
    "AdaptiveKDE",
    "FixedBinning",
    "Information",
    "InformationPlane",
    "InformationPlaneRecorder",
    "discrete_mi",
    "information_plane",
    "joint_entropy",
    "kde_information",
    "log_spaced",
    "permuted_label_information",
]

Reduce = Literal["mean", "flatten"]
SATURATED = 0.1  # bits below log2 N from which on an estimate says nothing


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
    if labels.shape != (len(codes),):
        raise ValueError(f"expected a label for each of {len(codes)} rows, got shape {tuple(labels.shape)}")
    symbols = _symbols(codes)
    return max(0.0, _entropy(symbols) - _conditional(symbols, _symbols(labels[:, None])))


def _symbols(codes: Tensor) -> np.ndarray:
    """A number for every distinct row, `[N]`."""
    if codes.dim() != 2 or codes.is_floating_point() or not len(codes):
        raise ValueError(f"expected integer codes [N, d], got {codes.dtype} of shape {tuple(codes.shape)}")
    columns = codes.detach().cpu().numpy().astype(np.int64)
    columns = columns - columns.min(0)
    found = np.zeros(len(columns), np.int64)
    count = 1
    # As many columns at a time as one integer holds; what they have in common is renumbered, so nothing collides.
    for column in columns.T:
        base = int(column.max()) + 1
        if count * base >= 2**62:
            found = np.unique(found, return_inverse=True)[1]
            count = int(found.max()) + 1
        found, count = found * base + column, count * base
    return np.unique(found, return_inverse=True)[1]


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
        symbols = _symbols(self.codes(_checked(activations, labels)))
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
                symbols, np.unique(inputs.flatten(1).cpu().numpy(), axis=0, return_inverse=True)[1].ravel()
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
        atom: the value of inactive units, the smallest there is: `"auto"` takes 0 where the layer's minimum is 0 and more
            than one activation has it; `None` takes none.
        per_neuron: bins of their own for every unit.
        official_top_bin: let the largest value be a bin of its own, as in the authors' code.

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
        if n_bins < 2:
            raise ValueError(f"expected at least 2 bins, got {n_bins}")
        self.n_bins, self.atom, self.per_neuron, self.official_top_bin = n_bins, atom, per_neuron, official_top_bin

    def codes(self, activations: Tensor) -> Tensor:
        values = _checked(activations, None).cpu().numpy() + 0.0  # -0.0 and 0.0 are one value
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
        if n_bins < 2 or not low < high:
            raise ValueError(f"expected at least 2 bins and low < high, got {n_bins}, {low}, {high}")
        self.n_bins, self.low, self.high = n_bins, low, high

    def codes(self, activations: Tensor) -> Tensor:
        place = (_checked(activations, None).double() - self.low) / (self.high - self.low)
        return (place * self.n_bins).floor().clamp(0, self.n_bins - 1).long().cpu()

    def __repr__(self) -> str:
        return f"FixedBinning(n_bins={self.n_bins}, low={self.low:g}, high={self.high:g})"


class AdaptiveKDE:
    """Bounds on the information of a layer plus a little noise, whose width follows the layer.

    $\\tilde T = T + \\epsilon$, $\\epsilon \\sim N(0, \\sigma^2 I)$ with $\\sigma = \\sigma_0 \\max |T|$; see `kde_information`. The
    estimate does not change when the layer is scaled.

    Args:
        noise_variance: $\\sigma_0^2$; 1e-3.
        scaling: `"max"` as above; `"variance"`, $\\sigma^2 = \\sigma_0^2 \\max |T|$; `"none"`, $\\sigma = \\sigma_0$. The paper
            says that the noise scales with the largest activity, and leaves open which of the first two.
        bound: `"upper"` or `"lower"`.

    Reference:
        Section 3; bounds of Kolchinsky and Tracey, "Estimating Mixture Entropy with Pairwise Distances", 2017.
    """

    def __init__(
        self,
        noise_variance: float = 1e-3,
        scaling: Literal["max", "variance", "none"] = "max",
        bound: Literal["upper", "lower"] = "upper",
    ) -> None:
        if not noise_variance > 0:
            raise ValueError(f"expected a positive noise_variance, got {noise_variance}")
        if scaling not in ("max", "variance", "none") or bound not in ("upper", "lower"):
            raise ValueError(
                f"expected scaling max, variance or none and bound upper or lower, got {scaling!r}, {bound!r}"
            )
        self.noise_variance, self.scaling = noise_variance, scaling
        self.bound: Literal["upper", "lower"] = bound

    def __call__(self, activations: Tensor, labels: Tensor | None = None, inputs: Tensor | None = None) -> Information:
        """Information of one layer; see `AdaptiveBinning`. `inputs` are not needed: the noise makes the layer random."""
        t = _checked(activations, labels).double()
        largest = float(t.abs().max())
        if largest == 0:
            return Information(0.0, math.nan if labels is None else 0.0)
        variance = self.noise_variance
        if self.scaling == "max":
            t = t / largest
        elif self.scaling == "variance":
            variance *= largest
        i_xt = kde_information(t, variance, self.bound)
        if labels is None:
            return Information(i_xt, math.nan)
        within = 0.0
        for y in labels.unique():
            rows = labels == y
            within += float(rows.double().mean()) * kde_information(t[rows], variance, self.bound)
        return Information(i_xt, max(0.0, i_xt - within))

    def __repr__(self) -> str:
        return f"AdaptiveKDE(noise_variance={self.noise_variance:g}, scaling={self.scaling!r}, bound={self.bound!r})"


def kde_information(T: Tensor, variance: float, bound: Literal["upper", "lower"] = "upper", chunk: int = 1024) -> float:
    """Bounds on $I(\\tilde T; X)$ of a layer with Gaussian noise, in bits, from pairwise distances:

    $$\\hat I = -\\frac1N \\sum_i \\log_2 \\frac1N \\sum_j \\exp\\Bigl(-\\frac{\\lVert t_i - t_j \\rVert^2}{c\\,\\sigma^2}\\Bigr),
    \\qquad c = 2 \\text{ (upper)}, \\; 8 \\text{ (lower)}.$$

    Args:
        T: `[N, d]`.
        variance: $\\sigma^2$.
        bound: which one; lower <= upper <= $\\log_2 N$.
        chunk: rows at a time.
    """
    if not variance > 0:
        raise ValueError(f"expected a positive variance, got {variance}")
    t = T.double()
    scale = (2 if bound == "upper" else 8) * variance
    total = 0.0
    for rows in t.split(chunk):
        distance = torch.cdist(rows, t, compute_mode="donot_use_mm_for_euclid_dist").square()
        total += float((torch.logsumexp(-distance / scale, 1) - math.log(len(t))).sum())
    return max(0.0, -total / len(t) / math.log(2))


def permuted_label_information(
    estimator: Estimator, activations: Tensor, labels: Tensor, repeats: int = 20, seed: int = 0
) -> tuple[float, float]:
    """What an estimator finds of $I(T;Y)$ where there is none: mean and deviation over shuffled labels."""
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = [
            estimator(activations, labels[torch.randperm(len(labels), generator=generator)]).i_ty
            for _ in range(repeats)
        ]
    return float(np.mean(found)), float(np.std(found))


def _checked(activations: Tensor, labels: Tensor | None) -> Tensor:
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


@dataclass(frozen=True)
class InformationPlane:
    """Information of layers at one moment.

    Attributes:
        layers: their names, in order.
        i_xt: $I(X;T)$ in bits, by layer.
        i_ty: $I(T;Y)$ in bits, by layer.
        dead: share of the units of a layer that are the same for all inputs: a fall of $I(X;T)$ by dying units is no
            compression by the others.
        saturated: whether almost every input has a symbol of its own, so that the estimate says nothing.
        inputs: number $N$; no information exceeds $\\log_2 N$.
    """

    layers: tuple[str, ...]
    i_xt: tuple[float, ...]
    i_ty: tuple[float, ...]
    dead: tuple[float, ...]
    saturated: tuple[bool, ...]
    inputs: int

    def to_frame(self) -> pd.DataFrame:
        """A row for every layer."""
        import pandas as pd

        columns = {"i_xt": self.i_xt, "i_ty": self.i_ty, "dead": self.dead, "saturated": self.saturated}
        return pd.DataFrame(columns, index=pd.Index(self.layers, name="layer"))

    def plot(self) -> Figure:
        """The information plane: a point for every layer, hollow where the estimate is saturated."""
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
        ax.plot(self.i_xt, self.i_ty, c="0.8", zorder=0)
        for k, name in enumerate(self.layers):
            face = "none" if self.saturated[k] else f"C{k % 10}"
            ax.scatter(self.i_xt[k], self.i_ty[k], s=50, facecolors=face, edgecolors=f"C{k % 10}", label=name)
        _axes(ax, self.inputs)
        return fig


def _axes(ax: Any, inputs: int) -> None:
    ax.axvline(math.log2(inputs), c="grey", ls=":", lw=1)
    ax.set(xlabel="$I(X;T)$ (bits)", ylabel="$I(T;Y)$ (bits)")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def information_plane(
    module: nn.Module,
    layers: Sequence[str | nn.Module],
    inputs: Tensor,
    labels: Tensor,
    estimator: Estimator | None = None,
    *,
    reduce: Reduce | None = None,
    output: bool = False,
    batch_size: int = 1024,
) -> InformationPlane:
    """Measure the layers of a network, in evaluation mode.

    Args:
        module: the network.
        layers: names of layers, or the modules themselves.
        inputs: `[N, ...]`.
        labels: `[N]`.
        estimator: `AdaptiveBinning()` by default.
        reduce: what becomes of positions, in layers of maps or tokens: their `"mean"`, or units of their own (`"flatten"`,
            which saturates soon).
        output: also measure the softmax of the network's output, as a last layer `output`.
        batch_size: inputs at a time.

    Raises:
        ValueError: on unknown layers, NaN (names the layer), labels of another number, or maps without `reduce`.
    """
    estimator = estimator if estimator is not None else AdaptiveBinning()
    inputs, labels = torch.as_tensor(inputs), torch.as_tensor(labels)
    names = [layer_name(module, layer) for layer in layers]
    found = _activations(module, names, inputs, reduce, output, batch_size)
    rows = [_measured(name, t, labels, estimator) for name, t in found.items()]
    i_xt, i_ty, dead, saturated = zip(*rows, strict=True)
    return InformationPlane(tuple(found), i_xt, i_ty, dead, saturated, len(inputs))


def _measured(name: str, t: Tensor, labels: Tensor, estimator: Estimator) -> tuple[float, float, float, bool]:
    if not bool(t.isfinite().all()):
        raise ValueError(f"the activations of {name} hold NaN or infinite values")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said by `saturated`
        found = estimator(t, labels.cpu())
    dead = float((t == t[:1]).all(0).double().mean())
    return found.i_xt, found.i_ty, dead, found.i_xt > math.log2(len(t)) - SATURATED


@torch.no_grad()
def _activations(
    module: nn.Module, names: list[str], inputs: Tensor, reduce: Reduce | None, output: bool, batch_size: int
) -> dict[str, Tensor]:
    """Activations `[N, d]` of every layer, on the CPU."""
    if reduce not in (None, "mean", "flatten"):
        raise ValueError(f"expected reduce to be 'mean', 'flatten' or None, got {reduce!r}")
    device = next((p.device for p in module.parameters()), inputs.device)
    parts: dict[str, list[Tensor]] = {}
    with untouched(module, training=False):
        for x in inputs.split(batch_size):
            with take_features(module, names, detach=True) as features:
                z = module(x.to(device))
                for name, t in features.items():
                    parts.setdefault(name, []).append(_rows(name, t, reduce, len(x)).cpu())
            if output:
                parts.setdefault("output", []).append(z.flatten(1).softmax(1).cpu())
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


def _rows(name: str, t: Tensor, reduce: Reduce | None, count: int) -> Tensor:
    if t.dim() < 2 or len(t) != count:
        raise ValueError(f"{name} gives {tuple(t.shape)} for {count} inputs, expected a row for each")
    if t.dim() == 2:
        return t
    if reduce is None:
        raise ValueError(
            f"{name} has activations of shape {tuple(t.shape)}; say by reduce='mean' or 'flatten' what becomes of positions"
        )
    return flatten_features(t, "all" if reduce == "flatten" else "pool")


def log_spaced(count: int, last: int) -> tuple[int, ...]:
    """About `count` moments from 0 to `last`, spaced evenly in their logarithm."""
    if count < 2 or last < 1:
        raise ValueError(f"expected at least 2 moments up to at least 1, got {count} up to {last}")
    return tuple(sorted({0, *np.round(np.geomspace(1, last, count - 1)).astype(int).tolist()}))


@dataclass
class InformationPlaneRecorder:
    """The information plane over training.

    Call `step(epoch)` in a loop of your own, or give it to `fit` among the callbacks, which calls it
    before the first step and after every epoch.

    Attributes:
        module: the network.
        layers: names of layers, or the modules.
        inputs: `[N, ...]`.
        labels: `[N]`.
        estimator: `AdaptiveBinning()` by default.
        when: epochs to measure at, such as `log_spaced(40, epochs)`; all by default.
        reduce: see `information_plane`.
        output: see `information_plane`.
        planes: what was measured, by epoch.
    """

    module: nn.Module
    layers: Sequence[str | nn.Module]
    inputs: Tensor
    labels: Tensor
    estimator: Estimator | None = None
    when: Sequence[int] | None = None
    reduce: Reduce | None = None
    output: bool = False
    planes: dict[int, InformationPlane] = field(default_factory=dict)
    from_start: ClassVar[bool] = True

    def step(self, epoch: int) -> InformationPlane | None:
        """Measure, if this epoch is to be measured."""
        if self.when is not None and epoch not in self.when:
            return None
        self.planes[epoch] = information_plane(
            self.module, self.layers, self.inputs, self.labels, self.estimator, reduce=self.reduce, output=self.output
        )
        return self.planes[epoch]

    def __call__(self, state: Any) -> None:
        if state.epoch_end or state.step == 0:
            self.step(state.epoch)

    def frame(self) -> pd.DataFrame:
        """A row for every epoch and layer: `i_xt`, `i_ty`, `dead`, `saturated`."""
        import pandas as pd

        if not self.planes:
            return pd.DataFrame(columns=["i_xt", "i_ty", "dead", "saturated"])
        frames: Any = {epoch: plane.to_frame() for epoch, plane in self.planes.items()}
        return pd.concat(frames, names=["epoch"])

    def compression(self) -> pd.DataFrame:
        """By layer: `compression`, the fall of $I(X;T)$ from its maximum to the end in bits; `at`, the epoch of the maximum;
        `regained`, the rise of $I(T;Y)$ from its minimum to the end."""
        return compression_of(self.frame())

    def plot(self) -> Figure:
        """Paths of all layers through the information plane, from light to dark."""
        import matplotlib.pyplot as plt

        table = self.frame().reset_index()
        fig, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
        for k, (name, rows) in enumerate(table.groupby("layer", sort=False)):
            ax.plot(rows["i_xt"], rows["i_ty"], c=f"C{k % 10}", lw=0.8, alpha=0.6)
            shades: Any = np.linspace(0.15, 1, len(rows))
            ax.scatter(rows["i_xt"], rows["i_ty"], c=[f"C{k % 10}"] * len(rows), alpha=shades, s=18, label=str(name))
        _axes(ax, len(self.inputs))
        return fig

    def state_dict(self) -> Mapping[str, Any]:
        """What was measured, for checkpoints."""
        return {"planes": [[epoch, asdict(plane)] for epoch, plane in self.planes.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.planes = {
            int(epoch): InformationPlane(
                tuple(p["layers"]),
                tuple(p["i_xt"]),
                tuple(p["i_ty"]),
                tuple(p["dead"]),
                tuple(p["saturated"]),
                p["inputs"],
            )
            for epoch, p in state["planes"]
        }


def compression_of(frame: pd.DataFrame) -> pd.DataFrame:
    """See `InformationPlaneRecorder.compression`; from a table of its `frame`."""
    import pandas as pd

    if not len(frame):
        raise ValueError("nothing has been measured yet")
    rows = {}
    for name, part in frame.reset_index().groupby("layer", sort=False):
        i_xt, i_ty = part["i_xt"].to_numpy(), part["i_ty"].to_numpy()
        rows[name] = {
            "compression": float(i_xt.max() - i_xt[-1]), "at": int(part["epoch"].to_numpy()[i_xt.argmax()]),
            "regained": float(i_ty[-1] - i_ty.min()),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
