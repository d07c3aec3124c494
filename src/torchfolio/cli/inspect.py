"""The command that looks inside a network, or at two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from torchfolio.cli._network import normalized_splits, open_network, say, show_result
from torchfolio.cli._options import MOST, MOST_SEED, Allow, AsJson, Data, Device, ImageSize, ModelSet, check_file
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable

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
    from torchfolio.cli import _comparison_cards, _cost_card, _information_card, _training_cards
    from torchfolio.cli import _inside as inside
    from torchfolio.data import Examples
    from torchfolio.engine.devices import resolve_device
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
    layers = list(layer) if layer else inside.top_layers(net, x[:2].to(place))
    shown = inside.Shown(splits, Examples((x, y)), tuple(source.manifest.classes))
    say(f"{name}: operations, parameters and memory")
    cost = _cost_card.cost(net, x, place)
    cards: list[Any] = [_cost_card.cost_card(name, cost)]
    result: dict[str, Any] = {
        "report": str(output), "layers": cost["table"].to_dict("records"), "saved_for_backward": cost["saved"],
    }  # fmt: skip
    if bundle is not None:
        say(f"{name}: its training")
        training = _training_cards.Training(bundle, name, source.manifest, data, image_size)
        training_cards, result["training"] = _training_cards.training_cards(training, net, shown)
        cards += training_cards
        card, result["size"] = _training_cards.size_card(training, net, shown)
        cards.append(card)
    say(f"{name}: losses of {len(x):,} examples")
    card, result["losses"] = inside.losses_card(net, shown)
    cards.append(card)
    if second is not None and other is not None:
        other_net = second.model.to(place)
        cards.append(learning_card(other, str(other)))
        say(f"{name} and {other}: matching units")
        table, card = _comparison_cards.matched(net, other_net, layers, x, name, str(other), seed)
        cards.append(card)
        result["matching"] = table.reset_index(drop=True).to_dict("records")
        say(f"{name} and {other}: similarity of layers")
        card, result["similarity"] = _comparison_cards.similarity_card(net, other_net, layers, x, name, str(other))
        cards.append(card)
    models = [net] if second is None else [net, second.model.to(place)]
    result["panels"] = {}
    for slug, analysis in _analyses(panel, len(models)).items():
        say(f"{name}: {slug}")
        analysis.classes = shown.classes
        chosen = models[: analysis.networks]
        look = partial(analysis.look, *chosen, data=shown.examples, layers=layers, seed=seed)
        card, result["panels"][slug] = inside.panel_card(slug, look)
        cards.append(card)
    result["information"] = []
    if y.is_floating_point():
        result["panels"]["information"] = {
            "not_shown": "What layers tell about the label is not shown: it needs classes."
        }
    else:
        say(f"{name}: information in {len(layers)} layers")
        information = _information_card.information(net, layers, x, y, bins)
        cards.append(_information_card.information_card(name, information, len(x), y))
        result["information"] = information["table"].reset_index().to_dict("records")
    told = {
        **result.get("training", {}),
        "size": result.get("size", {}),
        "losses": result["losses"],
        **result["panels"],
    }
    write_sheet(output, f"inside {name}", [*filter(None, cards), *inside.missing_card(told)])
    _show(result, as_json)


def _analyses(chosen: Sequence[str] | None, networks: int) -> dict[str, Any]:
    """Analyses that papers offer, by slug: those asked for, or all that are shown unasked."""
    import inspect as python_inspect

    from torchfolio import catalog
    from torchfolio.measure import Analysis

    analyses = {}
    for slug in chosen or catalog.offering("analysis"):
        offered = catalog.offered(slug, "analysis")
        if not (python_inspect.isclass(offered) and issubclass(offered, Analysis)):
            if chosen:
                raise TorchfolioError(f"the analysis of {slug} is no panel of inspect; see: torchfolio show {slug}")
            continue
        if chosen and offered.networks > networks:
            raise TorchfolioError(f"the analysis of {slug} compares {offered.networks} networks: name a second bundle")
        if offered.networks <= networks and (chosen or offered.by_default):
            analyses[slug] = offered()
    return analyses


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
