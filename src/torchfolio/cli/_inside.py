"""What `inspect` shows of a network, card by card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from torchfolio.bundle import Manifest
    from torchfolio.data import DataSplits, Examples
    from torchfolio.measure import Panel
    from torchfolio.report.sheet import Sheet

MOST_LAYERS = 12
BETWEEN = "(between layers)"
MOST_DRAWN = 3  # layers whose units are drawn one by one
MOST_ROWS = 20  # of a table that is read at a glance
SEEN = 500  # training examples that are looked at
SHARP = 128  # examples that the sharpness is taken over


@dataclass(frozen=True)
class Shown:
    """The examples that are looked at, and how they are shown to people.

    Attributes:
        splits: of the data, for pictures and texts.
        examples: (x, y), as the network takes them.
        classes: names of the labels.
    """

    splits: DataSplits
    examples: Examples
    classes: tuple[str, ...]

    def normalized(self, splits: DataSplits, manifest: Manifest) -> tuple[Tensor, Tensor]:
        """Training examples as the network takes them."""
        from torchfolio.cli._network import normalized

        x, y = normalized(splits.train, manifest.mean, manifest.std).tensors
        return x, y

    def as_people_see(self, x: Tensor) -> dict[str, Any]:
        """Inputs as pictures or as texts, for `example_losses` and `group_panel`; neither for rows of numbers."""
        if self.splits.vocabulary:
            return {"texts": [self.splits.text(row) for row in x]}
        return {"pictures": self.splits.denormalize(x)} if x.dim() == 4 else {}


@dataclass(frozen=True)
class Training:
    """What stands in a bundle of its training.

    Attributes:
        folder: of the bundle.
        name: of the network.
        manifest: of the bundle.
        data: name of the data set that is looked at.
        image_size: side of the images that are looked at.
    """

    folder: Path
    name: str
    manifest: Manifest
    data: str
    image_size: int | None

    def trained_on(self, count: int) -> DataSplits | None:
        """The first training examples, not normalised, where the data are those of the training; fewer if it had fewer."""
        from torchfolio.cli._network import fitting_splits

        trained = self.manifest.training
        if trained.get("data") != self.data or self.image_size not in (None, trained.get("image_size")):
            return None
        known = trained.get("examples")
        count = min(count, known) if isinstance(known, int) and known > 0 else count
        try:
            return fitting_splits(self.manifest, str(self.folder), self.data, seed=trained.get("seed", 0),
                                  train_size=count, test_size=1)  # fmt: skip
        except (TorchfolioError, ValueError, TypeError):
            return None

    def followed(self, targets: Sequence[float]) -> DataSplits | None:
        """The examples that were followed, where they are the first ones that were trained on."""
        splits = self.trained_on(len(targets))
        if splits is None:
            return None
        y = splits.train.tensors[1].double().reshape(len(splits.train), -1)[:, 0]
        return splits if y.tolist() == list(targets) else None


def panel_card(slug: str, look: Callable[[], Panel]) -> tuple[Sheet | None, dict[str, Any]]:
    """The card of one analysis; no card where it has nothing to say of this network, and why."""
    from torchfolio.report.sheet import Picture, Sheet, Table

    try:
        found = look()
    except ValueError as error:
        return None, {"not_shown": str(error)}
    card = Sheet(
        found.title,
        found.eyebrow or slug,
        sentences=found.sentences,
        notes=found.notes,
        tables=[Table.of(table) for table in found.tables],
        pictures=[Picture(figure, caption) for figure, caption in found.pictures],
    )
    return card, dict(found.record)


def missing_card(records: Mapping[str, Mapping[str, Any]]) -> list[Sheet]:
    """A card with what could not be told, and why; none where all could."""
    from torchfolio.report.sheet import Sheet

    reasons = [str(record["not_shown"]) for record in records.values() if "not_shown" in record]
    return [Sheet("What could not be told", sentences=reasons)] if reasons else []


def training_cards(training: Training, net: nn.Module, shown: Shown) -> tuple[list[Sheet], dict[str, Any]]:
    """How the training went: loss, sharpness against the step size, and the examples that moved it.

    Where the bundle keeps none of it, the cards say what cannot be told.
    """
    from torchfolio.cli._training import read_record
    from torchfolio.insight.training_panels import group_panel, sharpness_panel
    from torchfolio.report.learning import learning_card

    facts, record = training.manifest.training, read_record(training.folder)
    found: dict[str, tuple[Sheet | None, dict[str, Any]]] = {}
    found["history"] = learning_card(training.folder, training.name), {}
    if found["history"][0] is None:
        told = "How it was trained, epoch by epoch, cannot be told: the bundle holds no history.csv."
        found["history"] = None, {"not_shown": told}
    last = math.nan if record is not None else _last_sharpness(net, shown.splits)
    found["sharpness"] = panel_card("its sharpness", lambda: sharpness_panel(record, facts, last))
    if record is not None:
        followed = training.followed(record.targets)
        seen = replace(shown, splits=followed).as_people_see(followed.train.tensors[0]) if followed is not None else {}
        card, kept = panel_card("groups", lambda: group_panel(record, shown.classes, **seen))
        if followed is None and card is not None:
            card = replace(card, notes=[*card.notes, "The examples themselves are not shown: the data are not those it was trained on."])  # fmt: skip
        found["groups"] = card, kept
    return [card for card, _ in found.values() if card], {name: kept for name, (_, kept) in found.items()}


def _last_sharpness(net: nn.Module, splits: DataSplits) -> float:
    """Sharpness of the trained network over some training examples."""
    from torchfolio.insight.training_record import sharpness_of

    place = next((p.device for p in net.parameters()), None)
    x, y = (t[:SHARP].to(place) for t in splits.train.tensors)
    return sharpness_of(net, x, y)[0]


def size_card(training: Training, net: nn.Module, shown: Shown) -> tuple[Sheet | None, dict[str, Any]]:
    """Whether the size may sit at a peak of the test error."""
    from torchfolio.insight.size_panel import size_panel

    facts = training.manifest.training
    count = facts.get("examples")

    def look() -> Panel:
        splits = training.trained_on(SEEN)
        if splits is None:
            raise ValueError("Whether its size sits at a peak of the test error is not shown: the data are not those it was trained on.")  # fmt: skip
        seen = shown.normalized(splits, training.manifest)
        x, y = shown.examples.first(len(shown.examples))
        return size_panel(net, seen, (x, y), count if isinstance(count, int) else None)

    return panel_card("its size", look)


def losses_card(net: nn.Module, shown: Shown) -> tuple[Sheet | None, dict[str, Any]]:
    """Losses of the examples, and those with the largest."""
    from torchfolio.insight.example_losses import example_losses

    seen = shown.as_people_see(shown.examples.batches(None).__next__()[0])
    return panel_card("losses of examples", lambda: example_losses(net, shown.examples, shown.classes, **seen))


def top_layers(net: nn.Module, x: Tensor) -> list[str]:
    """Layers at the top of a network, a dozen of them at most, whose outputs hold units."""
    from torchfolio.models import collect_features

    names = [name for name, _ in net.named_children()]
    while len(names) == 1:  # a network inside another
        inner = net.get_submodule(names[0])
        below = [f"{names[0]}.{n}" for n, _ in inner.named_children()]
        if not below:
            break
        names = below
    known = []
    for name in names:
        try:
            found = collect_features(net, x, [name], flatten=False)[name]
        except (ValueError, KeyError, TypeError):
            continue  # not run, or without a tensor to show
        if (
            found.dim() >= 2 and len(found) == len(x) and found.is_floating_point()
        ):  # not positions, which are no examples
            known.append(name)
    if not known:
        raise TorchfolioError("no layer at the top of the network gives a tensor of units; name some with --layer")
    step = math.ceil(len(known) / MOST_LAYERS)
    return [*known[:-1][::step], known[-1]]


def cost(net: nn.Module, x: Tensor, place: Any) -> dict[str, Any]:
    """Operations, parameters and bytes by layer, for one example; and what a training step of 32 keeps.

    Rows sum up to the whole network: what is used without a call of its module has a row too.
    """
    import pandas as pd

    from torchfolio.measure import count_flops, flops_by_module, saved_bytes

    one = x[:1].to(place)
    table: Any = flops_by_module(net, one)
    table["output_bytes"] = [math.prod(shape) * 4 if shape else 0 for shape in table["shape"]]
    known, rest = set(table["name"]), {}
    for name, parameter in net.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in known:
            rest[owner] = rest.get(owner, 0) + parameter.numel()
    rows = [_row(owner or "(the network itself)", type(net.get_submodule(owner)).__name__, count, 0)
            for owner, count in rest.items()]  # fmt: skip
    between = count_flops(net, one) - int(sum(table["flops"].tolist()))
    if between:
        rows.append(_row(BETWEEN, "", 0, between))
    if rows:
        table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
    batch = x[:32].to(place)
    saved = saved_bytes(lambda: net(batch).sum().backward(), exclude=net).peak
    net.zero_grad(set_to_none=True)
    return {"table": table, "saved": int(saved), "batch": len(batch)}


def _row(name: str, kind: str, parameters: int, flops: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "parameters": parameters, "flops": flops, "shape": None, "output_bytes": 0}


def _by_block(table: pd.DataFrame) -> pd.DataFrame:
    """The table of layers by the parts of the network, as fine as fits on a screen."""
    names = [str(n) for n in table["name"]]
    depth = 1
    while depth < 12 and len({_prefix(n, depth + 1) for n in names}) <= MOST_ROWS:
        depth += 1
    parts = [_prefix(n, depth) for n in names]
    grouped: Any = table.assign(part=parts).groupby("part", sort=False)
    rows = grouped[["parameters", "flops", "output_bytes"]].sum()
    rows.insert(0, "layers", grouped.size())
    return rows


def _prefix(name: str, depth: int) -> str:
    return name if name.startswith("(") else ".".join(name.split(".")[:depth])


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
    from torchfolio.report.sheet import Picture, Sheet, Table

    sides = []
    for model in (net, other):
        place = next((p.device for p in model.parameters()), x.device)
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


def cost_card(name: str, cost: dict[str, Any]) -> Sheet:
    from torchfolio.report.sheet import Sheet, Table

    table: Any = cost["table"]
    total = [int(sum(table[key].tolist())) for key in ("parameters", "flops", "output_bytes")]
    shown = table if len(table) <= MOST_ROWS else _by_block(table)
    names = list(map(str, shown.index if shown.index.name else shown["name"]))
    operations = dict(zip(names, shown["flops"].tolist(), strict=True))
    between = operations.pop(BETWEEN, 0)
    most = max(operations, key=lambda n: operations[n]) if operations else ""
    sentences = [
        f"{total[0]:,} parameters, {total[1]:,} floating-point operations for one example, whose activations take "
        f"{total[2]:,} bytes in float32. Training on a batch of {cost['batch']} keeps {cost['saved']:,} bytes for the "
        "backward pass at its peak.",
    ]
    if total[1] and most:
        sentences.append(f"{most} takes the most operations, {operations[most] / total[1]:.0%} of all.")
    if between:
        sentences.append(
            f"{between / total[1]:.0%} are done between the layers that are listed: attention, products of inputs."
        )
    notes = []
    if shown is not table:
        notes.append(f"The {len(table)} layers are summed by the parts of the network; --json gives each.")
    columns = {"flops": "operations", "output_bytes": "bytes of outputs", "shape": "output"}
    return Sheet(
        f"What does {name} cost?",
        "operations, parameters, memory",
        sentences=sentences,
        notes=notes,
        tables=[Table.of(shown.rename(columns=columns))],
    )


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
