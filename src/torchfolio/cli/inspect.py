"""The command that looks inside a network, or at two side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio.cli._options import MOST, MOST_SEED, Allow, AsJson, Data, Device, ImageSize, ModelSet, check_file
from torchfolio.cli.networks import importable, normalized_splits, open_network, show_result
from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from torchfolio.report.sheet import Sheet

MOST_LAYERS = 12
Split = Annotated[str, typer.Option(help="train, val or test.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(inspect)


def inspect(
    data: Data,
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle; or name --model and --weights.")] = None,
    other: Annotated[Path | None, typer.Argument(help="A second bundle, to compare with.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML report.")] = Path("inspect.html"),
    model: Annotated[str | None, typer.Option(help="Reference network or package.module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its weights, a safetensors file.")] = None,
    model_set: ModelSet = None,
    allow: Allow = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layer to look at; may be repeated. By default those at the top of the network."),
    ] = None,
    panel: Annotated[
        list[str] | None,
        typer.Option(help="Method whose analysis is shown; may be repeated. By default all quick ones."),
    ] = None,
    examples: Annotated[int, typer.Option(min=16, max=MOST, help="Look at so many examples.")] = 1000,
    split: Split = "test",
    bins: Annotated[int, typer.Option(min=2, max=MOST, help="Bins of the adaptive estimate of information.")] = 30,
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the examples and of clusters.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Look inside a network: what its layers cost, what they tell about input and label; with two, which units match.

    Example: torchfolio inspect net/ other/ --data cifar10 -o report.html
    """
    from torchfolio.bundle import load_bundle
    from torchfolio.engine.evaluate import resolve_device
    from torchfolio.report.learning import learning_card
    from torchfolio.report.sheet import write_sheet

    if split not in ("train", "val", "test"):
        raise typer.BadParameter(f"expected train, val or test, got {split!r}", param_hint="--split")
    check_file(output)
    allow = importable([*(allow or []), *([model] if model and ":" in model else [])])
    source, splits = open_network(bundle, model, weights, model_set, allow, data, image_size, {"seed": seed})
    splits = normalized_splits(splits, source.manifest.mean, source.manifest.std)
    name = bundle.resolve().name if bundle is not None else weights.stem  # pyright: ignore[reportOptionalMemberAccess]
    second = load_bundle(other, allow=allow) if other is not None else None
    if second is not None and second.manifest.input_shape != source.manifest.input_shape:
        raise TorchfolioError(
            f"{name} takes inputs of shape {source.manifest.input_shape}, {other} of {second.manifest.input_shape}"
        )
    x, y = (t[:examples] for t in getattr(splits, split).tensors)
    place = resolve_device(device)
    net = source.model.to(place)
    layers = list(layer) if layer else _layers(net, x[:2].to(place))
    _say(f"{name}: operations, parameters and memory")
    cost = _cost(net, x, place)
    _say(f"{name}: information in {len(layers)} layers")
    information = _information(net, layers, x, y, bins)
    cards = [_cost_card(name, cost), _information_card(name, information, len(x), y)]
    result: dict[str, Any] = {
        "report": str(output), "layers": cost["table"].to_dict("records"), "saved_for_backward": cost["saved"],
        "information": information["table"].reset_index().to_dict("records"),
    }  # fmt: skip
    if second is not None:
        _say(f"{name} and {other}: matching units")
        table, card = _matched(net, second.model.to(place), layers, x, name, str(other), seed)
        cards.append(card)
        result["matching"] = table.reset_index(drop=True).to_dict("records")
    models = [net] if second is None else [net, second.model.to(place)]
    result["panels"] = {}
    for slug, analysis in _analyses(panel, len(models)).items():
        _say(f"{name}: {slug}")
        card, result["panels"][slug] = _panel(slug, analysis, models, (x, y), list(layer or ()), seed)
        cards.append(card)
    trained = [(bundle, name), (other, str(other))]
    cards += [card for place, called in trained if place and (card := learning_card(place, called)) is not None]
    write_sheet(output, f"inside {name}", cards)
    _show(result, as_json)


def _analyses(chosen: Sequence[str] | None, networks: int) -> dict[str, Any]:
    """Analyses that papers offer, by slug: those asked for, or all that are shown unasked."""
    import inspect as python_inspect

    from torchfolio import catalog
    from torchfolio.measure import Analysis

    found = {}
    for slug in chosen or catalog.offering("analysis"):
        offered = catalog.offered(slug, "analysis")
        if not (python_inspect.isclass(offered) and issubclass(offered, Analysis)):
            if chosen:
                raise TorchfolioError(f"the analysis of {slug} is no panel of inspect; see: torchfolio show {slug}")
            continue
        if chosen and offered.networks > networks:
            raise TorchfolioError(f"the analysis of {slug} compares {offered.networks} networks: name a second bundle")
        if offered.networks <= networks and (chosen or offered.by_default):
            found[slug] = offered()
    return found


def _panel(
    slug: str, analysis: Any, models: Sequence[nn.Module], data: Any, layers: Sequence[str], seed: int
) -> tuple[Sheet, dict[str, Any]]:
    """The card of one analysis; where it has nothing to say of this network, the card says why."""
    from torchfolio.data.examples import Examples
    from torchfolio.report.sheet import Picture, Sheet, Table

    try:
        found = analysis.look(*models[: analysis.networks], data=Examples(data), layers=layers, seed=seed)
    except ValueError as error:
        return Sheet(slug, "not shown", sentences=[str(error)]), {"not_shown": str(error)}
    card = Sheet(
        found.title,
        found.eyebrow or slug,
        sentences=found.sentences,
        notes=found.notes,
        tables=[Table.of(table) for table in found.tables],
        pictures=[Picture(figure, caption) for figure, caption in found.pictures],
    )
    return card, dict(found.record)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _layers(net: nn.Module, x: Tensor) -> list[str]:
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
        if found.dim() >= 2 and found.is_floating_point():
            known.append(name)
    if not known:
        raise TorchfolioError("no layer at the top of the network gives a tensor of units; name some with --layer")
    step = math.ceil(len(known) / MOST_LAYERS)
    return [*known[:-1][::step], known[-1]]


def _cost(net: nn.Module, x: Tensor, place: Any) -> dict[str, Any]:
    """Operations, parameters and bytes by layer, for one example; and what a training step of 32 keeps."""
    from torchfolio.measure import flops_by_module, saved_bytes

    table = flops_by_module(net, x[:1].to(place))
    sizes = [math.prod(shape) * 4 if shape else 0 for shape in table["shape"]]
    table["output_bytes"] = sizes
    batch = x[:32].to(place)
    saved = saved_bytes(lambda: net(batch).sum().backward(), exclude=net).peak
    net.zero_grad(set_to_none=True)
    return {"table": table, "saved": int(saved), "batch": len(batch)}


def _information(net: nn.Module, layers: Sequence[str], x: Tensor, y: Tensor, bins: int) -> dict[str, Any]:
    """Both adaptive estimates of every layer; positions of maps and tokens are averaged."""
    from torchfolio.insight.adaptive_mi import AdaptiveBinning, AdaptiveKDE, information_plane

    binned = information_plane(net, layers, x, y, AdaptiveBinning(bins), reduce="mean", output=True)
    kernel = information_plane(net, layers, x, y, AdaptiveKDE(), reduce="mean", output=True)
    table = binned.to_frame().rename(columns={"i_xt": "bins_i_xt", "i_ty": "bins_i_ty", "saturated": "bins_saturated"})
    other = kernel.to_frame()
    table["kernel_i_xt"], table["kernel_i_ty"], table["kernel_saturated"] = (
        other["i_xt"],
        other["i_ty"],
        other["saturated"],
    )
    return {"table": table, "binned": binned, "kernel": kernel, "bins": bins}


def _matched(
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
    table: Any = frame.reset_index(drop=True)[[c for c in shown if c in frame.columns]]
    sentences = [
        f"Units of {name} are matched one to one with those of {second} by the correlation of their activations over the "
        "same examples (bipartite: its mean; semi: with the best partner whoever else has it; above half: share of pairs "
        "with a correlation above 0.5).",
        "Losses are of predicting units of the second network linearly from all units of the first (dense) or from their "
        "match alone (one to one); 0.5 is no better than the mean. Mixed clusters: share of groups of units that both "
        "networks have.",
    ]
    card = Sheet("Do they have the same features?", f"convergent learning, {len(x):,} examples", sentences=sentences,
                 tables=[Table.of(table)], pictures=[Picture(report.plot(), "Matched units, predictions and clusters by layer.")])  # fmt: skip
    return frame, card


def _cost_card(name: str, cost: dict[str, Any]) -> Sheet:
    from torchfolio.report.sheet import Sheet, Table

    table = cost["table"]
    total = [int(sum(table[key].tolist())) for key in ("parameters", "flops", "output_bytes")]
    sentences = [
        f"{total[0]:,} parameters, {total[1]:,} floating-point operations for one example, whose activations take "
        f"{total[2]:,} bytes in float32. Training on a batch of {cost['batch']} keeps {cost['saved']:,} bytes for the "
        "backward pass at its peak.",
    ]
    return Sheet(
        f"What the layers of {name} cost",
        "operations, parameters, memory",
        sentences=sentences,
        tables=[Table.of(table)],
    )


def _information_card(name: str, information: dict[str, Any], count: int, y: Tensor) -> Sheet:
    from torchfolio.report.sheet import Picture, Sheet, Table

    table = information["table"]
    counts = y.bincount().double()
    p = counts[counts > 0] / counts.sum()
    sentences = [
        f"What activity T of each layer tells about the input X and the label Y, in bits, from {count:,} examples: no layer "
        f"can tell more than {math.log2(count):.2f} bits about the input, nor more than {float(-(p * p.log2()).sum()):.2f} about "
        f"the label. Estimates by {information['bins']} adaptive bins and by adaptive kernels; positions of maps and tokens are "
        "averaged.",
    ]
    notes = []
    for kind, column in (("bins", "bins_saturated"), ("kernels", "kernel_saturated")):
        full = [str(layer) for layer, flag in zip(table.index, table[column].tolist(), strict=True) if flag]
        if full:
            notes.append(
                f"The estimate by {kind} is saturated in {', '.join(full)}: almost every example has an activity of its own, so "
                "that it says nothing about these layers. Take more examples, or fewer bins."
            )
    dead = [str(layer) for layer, share in zip(table.index, table["dead"].tolist(), strict=True) if share > 0]
    if dead:
        notes.append(f"Units that are the same for all examples stand in {', '.join(dead)}.")
    pictures = [
        Picture(information["binned"].plot(), "Information plane by adaptive bins; hollow: saturated."),
        Picture(information["kernel"].plot(), "Information plane by adaptive kernels; hollow: saturated."),
    ]
    return Sheet(f"What the layers of {name} tell", "adaptive estimators of mutual information", sentences=sentences, notes=notes,
                 tables=[Table.of(table)], pictures=pictures)  # fmt: skip


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_result(result, True)
        return
    parameters, flops = (sum(row[key] for row in result["layers"]) for key in ("parameters", "flops"))
    shown: dict[str, Any] = {"report": result["report"], "parameters": f"{parameters:,}", "flops": f"{flops:,}"}
    for row in result["information"]:
        full = " (saturated)" if row["bins_saturated"] else ""
        shown[row["layer"]] = f"I(X;T) {row['bins_i_xt']:.2f} bits{full}, I(T;Y) {row['bins_i_ty']:.2f}"
    for row in result.get("matching", []):
        shown[f"{row['layer_a']} matched"] = f"{row['bipartite']:.2f} one to one, {row['semi']:.2f} best partner"
    show_result(shown, False)
