"""Pictures that most experiments draw: curves and scores over seeds, images side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchfolio.runs.outcome import Results

__all__ = ["Figures", "axes", "bars", "curves", "grid", "groups", "matrices", "scatter"]

Value = tuple[str, str]
"""An arm, and the name of one of its values."""
Figures = dict[str, "Figure"]
"""Pictures of an experiment by name."""


def axes(xlabel: str = "", ylabel: str = "", *, width: float = 6.0, height: float = 4.0) -> tuple[Figure, Axes]:
    """A figure with one pair of labelled axes and a faint grid."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    return fig, ax


def curves(
    results: Results,
    lines: Mapping[str, Value | Sequence[Value]],
    *,
    x: Sequence[float] | np.ndarray | None = None,
    levels: Mapping[str, Value] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    logx: bool = False,
    logy: bool = False,
) -> Figure:
    """Lines of means over seeds, each with a band from the lowest to the highest seed.

    Args:
        results: results of all seeds.
        lines: pairs `(arm, value)` by label, where the value is a list or array `[N]`, or N such pairs, whose values
            are numbers.
        x: places `[N]`; 1 to N by default.
        levels: `(arm, value)` by label; each is a number, drawn as a dashed line at its mean over seeds.
        xlabel: text under the axis.
        ylabel: text beside the axis.
        logx: whether x is logarithmic.
        logy: whether y is logarithmic.
    """
    fig, ax = axes(xlabel, ylabel)
    for label, line in lines.items():
        values = _values(results, line)
        places = np.arange(1, values.shape[1] + 1) if x is None else np.asarray(x, dtype=float)
        ax.plot(places, values.mean(0), label=label, marker="." if values.shape[1] <= 20 else None)
        ax.fill_between(places, values.min(0), values.max(0), alpha=0.2, linewidth=0)
    for k, (label, value) in enumerate((levels or {}).items(), start=len(lines)):
        ax.axhline(results.values(*value).mean(), linestyle="--", color=f"C{k % 10}", label=label)
    if logx:
        ax.set_xscale("log")
    if logy:
        ax.set_yscale("log")
    ax.legend()
    return fig


def _values(results: Results, line: Value | Sequence[Value]) -> np.ndarray:
    """A line over seeds, `[seeds, N]`."""
    if isinstance(line[0], str):
        return results.values(*line)  # pyright: ignore[reportArgumentType]
    return np.stack([results.values(*pair) for pair in line], axis=1)


def scatter(
    results: Results,
    points: Mapping[str, tuple[Value, Value] | Sequence[tuple[Value, Value]]],
    *,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """One score against another: a dot for every seed, and a larger one at the mean.

    Args:
        results: results of all seeds.
        points: two pairs `(arm, value)` by label, across and up; every value is a number. A label of several such
            points joins their means by a line.
        xlabel: text under the axis.
        ylabel: text beside the axis.
    """
    fig, ax = axes(xlabel, ylabel)
    for k, (label, given) in enumerate(points.items()):
        joined: Any = [given] if isinstance(given[0][0], str) else given
        x, y = (np.stack([results.values(*point[axis]) for point in joined], axis=1) for axis in (0, 1))
        color = f"C{k % 10}"
        ax.plot(x, y, ".", color=color, alpha=0.5)
        ax.plot(x.mean(0), y.mean(0), "o^sDv"[k // 10 % 5], linestyle="-", color=color, markersize=8, label=label)
    ax.legend()
    return fig


def bars(results: Results, scores: Mapping[str, Value], *, ylabel: str = "") -> Figure:
    """One place for each score: its mean with the spread over seeds, and a dot for every seed.

    Args:
        results: results of all seeds.
        scores: `(arm, value)` by label; every value is a number.
        ylabel: text beside the axis.
    """
    fig, ax = axes(ylabel=ylabel, width=max(4.0, 1.0 + 0.8 * len(scores)))
    for k, (arm, name) in enumerate(scores.values()):
        values = results.values(arm, name)
        ax.bar(k, values.mean(), color=f"C{k % 10}", alpha=0.35, width=0.7)
        ax.plot(np.full(len(values), k), values, "o", color=f"C{k % 10}", markersize=4)
    _name_places(ax, list(scores))
    return fig


def _name_places(ax: Axes, names: Sequence[str]) -> None:
    """Names under the axis, slanted where there are many."""
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(names) > 4 else {}
    ax.set_xticks(range(len(names)), names, **slant)
    ax.grid(axis="x", visible=False)


def groups(results: Results, series: Mapping[str, Mapping[str, Value]], *, ylabel: str = "") -> Figure:
    """Bars side by side at each place, one of each series: means, and a dot for every seed.

    Args:
        results: results of all seeds.
        series: `(arm, value)` by place, by label of the series; every value is a number. A series may leave places out.
        ylabel: text beside the axis.
    """
    places = list(dict.fromkeys(place for scores in series.values() for place in scores))
    width = 0.8 / len(series)
    fig, ax = axes(ylabel=ylabel, width=max(5.0, 1.0 + 0.8 * len(places)))
    for k, (label, scores) in enumerate(series.items()):
        at = np.array([places.index(place) for place in scores]) + (k - (len(series) - 1) / 2) * width
        values = np.stack([results.values(arm, name) for arm, name in scores.values()], 1)
        ax.bar(at, values.mean(0), width, color=f"C{k % 10}", alpha=0.35, label=label)
        ax.plot(np.tile(at, len(values)), values.ravel(), ".", color=f"C{k % 10}")
    _name_places(ax, places)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(series), 4), frameon=False)  # beside no bars
    return fig


def grid(images: Any, titles: Sequence[str] = (), *, columns: int = 8) -> Figure:
    """Images side by side.

    Args:
        images: `[N, C, H, W]` or `[N, H, W]`, tensor or array; values outside 0 to 1 are scaled to it, all alike.
        titles: one for each image, or none.
        columns: maximum number of images in a row.
    """
    import matplotlib.pyplot as plt

    array = np.asarray(images, dtype=float)
    array = array[:, None] if array.ndim == 3 else array
    low, high = min(0.0, float(array.min())), max(1.0, float(array.max()))
    array = (array - low) / (high - low)
    rows, across = -(-len(array) // columns), min(columns, len(array))
    fig, places = plt.subplots(rows, across, figsize=(1.4 * across, 1.6 * rows), layout="constrained", squeeze=False)
    for ax in places.flat:
        ax.axis("off")
    for k, (ax, image) in enumerate(zip(places.flat, array, strict=False)):
        ax.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
        if titles:
            ax.set_title(titles[k], fontsize=8)
    return fig


def matrices(tables: Mapping[str, Any], *, xlabel: str = "", ylabel: str = "", digits: int | None = 0) -> Figure:
    """Tables of numbers side by side in one scale of colours, with a number in every cell.

    Args:
        tables: arrays `[rows, columns]` by title; a cell of NaN stays empty.
        xlabel: text under the axis.
        ylabel: text beside the axis.
        digits: digits after the point; `None` leaves the numbers out, where there are many cells.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    arrays = {title: np.asarray(table, dtype=float) for title, table in tables.items()}
    low, high = (f([f(array) for array in arrays.values()]) for f in (np.nanmin, np.nanmax))
    fig, places = plt.subplots(1, len(arrays), figsize=(4 * len(arrays), 4), layout="constrained", squeeze=False)
    for ax, (title, array) in zip(places.flat, arrays.items(), strict=True):
        ax.imshow(array, vmin=low, vmax=high, cmap="Blues")
        for (row, column), value in np.ndenumerate(array):
            if digits is not None and np.isfinite(value):
                dark = value > (low + high) / 2
                ax.text(
                    column, row, f"{value:.{digits}f}", ha="center", va="center", color="white" if dark else "black"
                )
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    return fig
