"""Two networks compared: units that match, and layers that hold alike representations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from torchfolio.report.sheet import Sheet

MOST_DRAWN = 3  # layers whose units are drawn one by one


def matched(
    net: nn.Module, other: nn.Module, layers: Sequence[str], x: Tensor, name: str, second: str, seed: int
) -> tuple[pd.DataFrame, Sheet]:
    """Units of two networks, matched layer by layer."""
    from torchfolio.insight.convergent_learning import ConvergenceReport
    from torchfolio.report.sheet import Picture, Sheet, Table

    missing = [layer for layer in layers if layer not in dict(other.named_modules())]
    if missing:
        raise TorchfolioError(f"{second} has no layer {missing[0]}; name layers that both networks have with --layer")
    report = ConvergenceReport.from_modules(net, other, x, layers=list(layers), random_state=seed)
    frame = report.to_frame()
    shown = ["layer_a", "units_a", "dead_a", "dead_b", "bipartite", "semi", "above_half", "dense_loss", "one_to_one_loss",
             "mixed_clusters"]  # fmt: skip
    words = {"layer_a": "layer", "units_a": "units", "dead_a": f"dead in {name}", "dead_b": f"dead in {second}",
             "bipartite": "one to one", "semi": "best partner", "above_half": "share above 0.5", "dense_loss": "loss from all units",
             "one_to_one_loss": "loss from the match", "mixed_clusters": "mixed clusters"}  # fmt: skip
    table: Any = frame.reset_index(drop=True)[[c for c in shown if c in frame.columns]]
    table = table.rename(columns=words)
    sentences = [
        f"Units of {name} are matched one to one with those of {second} by the correlation of their activations over the "
        "same examples (one to one: its mean; best partner: whoever else has it too; share above 0.5: of pairs with such a "
        "correlation). Some correlation is there by chance and by kind: compare with an untrained network of the same layers.",
        "Losses are of predicting units of the second network linearly from all units of the first (dense) or from their "
        "match alone (one to one); 0.5 is no better than the mean. Mixed clusters: share of groups of units that both "
        "networks have.",
    ]
    step = -(-len(report.layers) // MOST_DRAWN)
    drawn = ConvergenceReport(report.layers[::step])
    caption = "Matched units, predictions and clusters by layer" + (", of a few layers." if step > 1 else ".")
    card = Sheet("Do they have the same features?", f"convergent learning, {len(x):,} examples", sentences=sentences,
                 tables=[Table.of(table)], pictures=[Picture(drawn.plot(), caption)])  # fmt: skip
    return frame, card


def similarity_card(
    net: nn.Module, other: nn.Module, layers: Sequence[str], x: Tensor, name: str, second: str
) -> tuple[Sheet, dict[str, Any]]:
    """Which layers of two networks hold alike representations, whatever their units."""
    import matplotlib.pyplot as plt
    import pandas as pd
    import torch

    from torchfolio.measure.similarity import linear_cka_pairs
    from torchfolio.models import collect_features
    from torchfolio.models.device import device_of
    from torchfolio.report.sheet import Picture, Sheet, Table

    sides = []
    for model in (net, other):
        place = device_of(model, x)
        sides.append(
            {n: t.cpu() for n, t in collect_features(model, x.to(place), list(layers), flatten="pool").items()}
        )
    pairs = [(i, j) for i in layers for j in layers]
    values = torch.stack([v.double().cpu() for v in linear_cka_pairs(sides[0], sides[1], pairs)]).view(
        len(layers), len(layers)
    )
    same = values.diagonal()
    best = values.argmax(1)
    table = pd.DataFrame({"layer": list(layers), "with the same layer": same.tolist(),
                          "most alike": [layers[int(j)] for j in best], "with it": values.max(1).values.tolist()})  # fmt: skip
    moved = [layers[i] for i, j in enumerate(best.tolist()) if i != j]
    sentences = [
        f"Centred kernel alignment of the responses of {name} and {second} to {len(x):,} examples, positions averaged: 1 where "
        "one is the other up to a rotation and a scale, near 0 where they order the examples in unlike ways.",
        (
            "Most like another layer than their own are " + ", ".join(moved)
            if moved
            else "Every layer is most like the same layer of the other network"
        )
        + "; "
        f"the layer that differs most is {layers[int(same.argmin())]}, with {float(same.min()):.2f}.",
    ]
    widest = max(t.shape[1] for side in sides for t in side.values())
    notes = [f"With {len(x)} examples and up to {widest} units a layer the alignment is too high; take more examples."] if len(x) < 2 * widest else []  # fmt: skip
    pictures = []
    if len(layers) > 2:
        fig, ax = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
        image = ax.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis")
        ax.set_xticks(range(len(layers)), list(layers), rotation=45, ha="right")
        ax.set_yticks(range(len(layers)), list(layers))
        ax.set(xlabel=second, ylabel=name)
        fig.colorbar(image, label="alignment")
        pictures = [Picture(fig, "Alignment of every layer with every layer.")]
    card = Sheet("Do they see the examples alike?", f"similarity by layer, {len(x):,} examples", sentences=sentences,
                 notes=notes, tables=[Table.of(table)], pictures=pictures)  # fmt: skip
    return card, {"layers": list(layers), "alignment": values.tolist()}
