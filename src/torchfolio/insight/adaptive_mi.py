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

All information is in bits. Longer than most because estimators are given and the plane is recorded by the same names.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.insight.activations import layer_name
from torchfolio.insight.information_estimators import (
    SATURATED,
    AdaptiveBinning,
    Estimator,
    FixedBinning,
    Information,
    discrete_mi,
    joint_entropy,
    permuted_label_information,
)
from torchfolio.insight.information_kernels import AdaptiveKDE, kde_information
from torchfolio.measure import untouched
from torchfolio.measure.batches import taking
from torchfolio.models import flatten_features, take_features
from torchfolio.models.device import device_of
from torchfolio.shown import Shown

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
        module: network.
        layers: names of layers, or the modules themselves.
        inputs: `[N, ...]`.
        labels: `[N]`.
        estimator: `AdaptiveBinning()` by default.
        reduce: treatment of positions, in layers of maps or tokens: their `"mean"`, or units of their own (`"flatten"`,
            which saturates soon).
        output: whether to measure, too, the softmax of the network's output, as a last layer `output`.
        batch_size: inputs at a time.

    Raises:
        ValueError: on unknown layers, NaN (names the layer), labels of another number, maps without `reduce`, or inputs that
            the network cannot take, as those of another dtype than its weights.
    """
    estimator = estimator if estimator is not None else AdaptiveBinning()
    inputs, labels = torch.as_tensor(inputs), torch.as_tensor(labels)
    names = [layer_name(module, layer) for layer in layers]
    activations = _activations(module, names, inputs, reduce, output, batch_size)
    rows = [_measured(name, t, labels, estimator) for name, t in activations.items()]
    i_xt, i_ty, dead, saturated = zip(*rows, strict=True)
    return InformationPlane(tuple(activations), i_xt, i_ty, dead, saturated, len(inputs))


def _measured(name: str, t: Tensor, labels: Tensor, estimator: Estimator) -> tuple[float, float, float, bool]:
    if not bool(t.isfinite().all()):
        raise ValueError(f"the activations of {name} hold NaN or infinite values")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said by `saturated`
        estimate = estimator(t, labels.cpu())
    dead = float((t == t[:1]).all(0).double().mean())
    return estimate.i_xt, estimate.i_ty, dead, estimate.i_xt > math.log2(len(t)) - SATURATED


@torch.no_grad()
def _activations(
    module: nn.Module, names: list[str], inputs: Tensor, reduce: Reduce | None, output: bool, batch_size: int
) -> dict[str, Tensor]:
    """Activations `[N, d]` of every layer, on the CPU."""
    if reduce not in (None, "mean", "flatten"):
        raise ValueError(f"expected reduce to be 'mean', 'flatten' or None, got {reduce!r}")
    device = device_of(module, inputs)
    parts: dict[str, list[Tensor]] = {}
    with untouched(module, training=False):
        for x in inputs.split(batch_size):
            with take_features(module, names, detach=True) as features, taking(module, x):
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


@dataclass(repr=False)
class InformationPlaneRecorder(Shown):
    """The information plane over training.

    Call `step(epoch)` in a loop of your own, or give it to `fit` among the callbacks, which calls it
    before the first step and after every epoch.

    Attributes:
        module: network.
        layers: names of layers, or the modules.
        inputs: `[N, ...]`.
        labels: `[N]`.
        estimator: `AdaptiveBinning()` by default.
        when: epochs to measure at, such as `log_spaced(40, epochs)`; all by default.
        reduce: treatment of positions, see `information_plane`.
        output: whether the output is measured too, see `information_plane`.
        planes: planes that were measured, by epoch.
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
        `regained`, the rise of $I(T;Y)$ from its minimum to the end; `saturated`, whether the estimate of the maximum or of
        the end says nothing."""
        return compression_of(self.frame())

    def plot(self) -> Figure:
        """Paths of all layers through the information plane, from light to dark, hollow where an estimate is saturated."""
        import matplotlib.pyplot as plt
        from matplotlib.colors import to_rgba

        table = self.frame().reset_index()
        fig, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
        for k, (name, rows) in enumerate(table.groupby("layer", sort=False)):
            ax.plot(rows["i_xt"], rows["i_ty"], c=f"C{k % 10}", lw=0.8, alpha=0.6)
            shades: Any = [to_rgba(f"C{k % 10}", shade) for shade in np.linspace(0.15, 1, len(rows))]
            faces = [(0, 0, 0, 0) if full else shade for shade, full in zip(shades, rows["saturated"], strict=True)]
            ax.scatter(rows["i_xt"], rows["i_ty"], facecolors=faces, edgecolors=shades, s=18, label=str(name))
        _axes(ax, len(self.inputs))
        return fig

    def state_dict(self) -> Mapping[str, Any]:
        """What was measured, for checkpoints."""
        return {"planes": [[epoch, asdict(plane)] for epoch, plane in self.planes.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.planes = {
            int(epoch): InformationPlane(
                **{**{k: tuple(v) for k, v in plane.items() if k != "inputs"}, "inputs": plane["inputs"]}
            )
            for epoch, plane in state["planes"]
        }


def compression_of(frame: pd.DataFrame) -> pd.DataFrame:
    """See `InformationPlaneRecorder.compression`; from a table of its `frame`."""
    import pandas as pd

    if not len(frame):
        raise ValueError("nothing has been measured yet")
    rows = {}
    for name, part in frame.reset_index().groupby("layer", sort=False):
        i_xt, i_ty = part["i_xt"].to_numpy(), part["i_ty"].to_numpy()
        full, top = part["saturated"].to_numpy(), i_xt.argmax()
        rows[name] = {
            "compression": float(i_xt[top] - i_xt[-1]), "at": int(part["epoch"].to_numpy()[top]),
            "regained": float(i_ty[-1] - i_ty.min()), "saturated": bool(full[top] or full[-1]),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
