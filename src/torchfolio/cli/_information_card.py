"""What layers know of inputs and labels, and its card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchfolio.report.sheet import Sheet


def information(net: nn.Module, layers: Sequence[str], x: Tensor, y: Tensor, bins: int) -> dict[str, Any]:
    """Both adaptive estimates of every layer; positions of maps and tokens are averaged."""
    import torch

    from torchfolio.insight.adaptive_mi import AdaptiveBinning, AdaptiveKDE, information_plane

    binned = information_plane(net, layers, x, y, AdaptiveBinning(bins), reduce="mean", output=True)
    kernel = information_plane(net, layers, x, y, AdaptiveKDE(), reduce="mean", output=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    chance = information_plane(net, layers, x, y[order], AdaptiveBinning(bins), reduce="mean", output=True)
    table = binned.to_frame().rename(columns={"i_xt": "bins_i_xt", "i_ty": "bins_i_ty", "saturated": "bins_saturated"})
    other = kernel.to_frame()
    table["kernel_i_xt"], table["kernel_i_ty"], table["kernel_saturated"] = (
        other["i_xt"],
        other["i_ty"],
        other["saturated"],
    )
    table.insert(2, "bins_chance", chance.i_ty)
    return {"table": table, "binned": binned, "kernel": kernel, "bins": bins}


def information_card(name: str, information: dict[str, Any], count: int, y: Tensor) -> Sheet:
    from torchfolio.report.sheet import Picture, Sheet, Table

    table = information["table"]
    counts = y.bincount().double()
    p = counts[counts > 0] / counts.sum()
    sentences = [
        f"What activity T of each layer tells about the input X and the label Y, in bits, from {count:,} examples: no layer "
        f"can tell more than {math.log2(count):.2f} bits about the input, nor more than {float(-(p * p.log2()).sum()):.2f} about "
        f"the label. Estimates by {information['bins']} adaptive bins and by adaptive kernels; positions of maps and tokens are "
        "averaged. What bins find about shuffled labels is chance: only what is beyond it is about the label.",
    ]
    full = {kind: [str(layer) for layer, flag in zip(table.index, table[column].tolist(), strict=True) if flag]
            for kind, column in (("bins", "bins_saturated"), ("kernels", "kernel_saturated"))}  # fmt: skip
    notes = []
    if full["bins"] == full["kernels"] and full["bins"]:
        full = {"either": full["bins"]}
    for kind, layers in full.items():
        if layers:
            which = "every layer" if len(layers) == len(table) else ", ".join(layers)
            how = "Both estimates are" if kind == "either" else f"The estimate by {kind} is"
            notes.append(
                f"{how} saturated in {which}: almost every example has an activity of its own, so that "
                "the figures say nothing there. Take more examples (--examples), fewer bins (--bins), or narrower layers (--layer)."
            )
    dead = [str(layer) for layer, share in zip(table.index, table["dead"].tolist(), strict=True) if share > 0]
    if dead:
        notes.append(f"Units that are the same for all examples stand in {', '.join(dead)}.")
    drawn = (("binned", "bins_saturated", "adaptive bins"), ("kernel", "kernel_saturated", "adaptive kernels"))
    pictures = [
        Picture(information[key].plot(), f"Information plane by {words}; hollow: saturated.")
        for key, column, words in drawn
        if (~table[column].astype(bool)).sum() > 1  # one point is no path
    ]
    columns = {"bins_i_xt": "about the input, bins", "bins_i_ty": "about the label, bins", "bins_chance": "about shuffled labels, bins", "dead": "dead units",
               "bins_saturated": "says nothing, bins", "kernel_i_xt": "about the input, kernels",
               "kernel_i_ty": "about the label, kernels", "kernel_saturated": "says nothing, kernels"}  # fmt: skip
    return Sheet(f"What do the layers of {name} tell?", "adaptive estimators of mutual information", sentences=sentences, notes=notes,
                 tables=[Table.of(table.rename(columns=columns))], pictures=pictures)  # fmt: skip
