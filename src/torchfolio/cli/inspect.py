"""The command that looks inside a network, or at two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio.cli._network import normalized_splits, open_network, say, show_result
from torchfolio.cli._options import MOST, MOST_SEED, Allow, AsJson, Data, Device, ImageSize, ModelSet, check_file
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable

if TYPE_CHECKING:
    from torch import nn

    from torchfolio.bundle import Manifest
    from torchfolio.cli._inside import Shown
    from torchfolio.report.sheet import Sheet

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
    from torchfolio.cli._inside import Shown, top_layers
    from torchfolio.data import Examples
    from torchfolio.engine.devices import resolve_device

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
    if source.manifest.training.get("predictor"):
        say(
            f"{name} answers over time by its rule, {source.manifest.training.get('rule')}; one step of it is looked at"
        )
    layers = list(layer) if layer else top_layers(net, x[:2].to(place))
    look = _Look(name, net, layers, Shown(splits, Examples((x, y)), tuple(source.manifest.classes)), seed)
    look.cost(place)
    if bundle is not None:
        look.training(bundle, source.manifest, data, image_size)
    look.losses()
    if second is not None and other is not None:
        second.model.to(place)
        look.beside(second.model, other)
    look.panels(panel, [net] if second is None else [net, second.model])
    look.information(bins)
    look.write(output)
    _show(look.record, as_json)


class _Look:
    """A look inside a network: cards of a report and what programs read of them, part by part.

    Args:
        name: name of the network.
        net: network.
        layers: layers that are looked at.
        shown: examples that it is looked at on.
        seed: seed of what is drawn.
    """

    def __init__(self, name: str, net: nn.Module, layers: list[str], shown: Shown, seed: int) -> None:
        self.name, self.net, self.layers, self.shown, self.seed = name, net, layers, shown, seed
        self.x, self.y = next(shown.examples.batches(None))
        self.cards: list[Sheet | None] = []
        self.record: dict[str, Any] = {}

    def cost(self, place: Any) -> None:
        """Operations, parameters and memory of every layer."""
        from torchfolio.cli import _cost_card

        say(f"{self.name}: operations, parameters and memory")
        cost = _cost_card.cost(self.net, self.x, place)
        self.cards.append(_cost_card.cost_card(self.name, cost))
        self.record |= {"layers": cost["table"].to_dict("records"), "saved_for_backward": cost["saved"]}

    def training(self, bundle: Path, manifest: Manifest, data: str, image_size: int | None) -> None:
        """What the bundle keeps of the training, and how large the network is for it."""
        from torchfolio.cli import _training_cards

        say(f"{self.name}: its training")
        training = _training_cards.Training(bundle, self.name, manifest, data, image_size)
        cards, self.record["training"] = _training_cards.training_cards(training, self.net, self.shown)
        card, self.record["size"] = _training_cards.size_card(training, self.net, self.shown)
        self.cards += [*cards, card]

    def losses(self) -> None:
        """Losses of the examples."""
        from torchfolio.cli._inside import losses_card

        say(f"{self.name}: losses of {len(self.x):,} examples")
        card, self.record["losses"] = losses_card(self.net, self.shown)
        self.cards.append(card)

    def beside(self, other: nn.Module, folder: Path) -> None:
        """Units that match between this network and another, and how similar layers are."""
        from torchfolio.cli import _comparison_cards
        from torchfolio.report.learning import learning_card

        name = str(folder)
        say(f"{self.name} and {name}: matching units")
        table, matching = _comparison_cards.matched(self.net, other, self.layers, self.x, self.name, name, self.seed)
        say(f"{self.name} and {name}: similarity of layers")
        similarity, record = _comparison_cards.similarity_card(self.net, other, self.layers, self.x, self.name, name)
        self.cards += [learning_card(folder, name), matching, similarity]
        self.record |= {"matching": table.reset_index(drop=True).to_dict("records"), "similarity": record}

    def panels(self, chosen: Sequence[str] | None, models: Sequence[nn.Module]) -> None:
        """Analyses that papers offer."""
        from torchfolio.cli._inside import panel_card

        self.record["panels"] = {}
        for slug, analysis in _analyses(chosen, len(models)).items():
            say(f"{self.name}: {slug}")
            analysis.classes = self.shown.classes
            some = models[: analysis.networks]
            look = partial(analysis.look, *some, data=self.shown.examples, layers=self.layers, seed=self.seed)
            card, self.record["panels"][slug] = panel_card(slug, look)
            self.cards.append(card)

    def information(self, bins: int) -> None:
        """What layers tell about input and label."""
        from torchfolio.cli import _information_card

        if self.y.is_floating_point():
            reason = "What layers tell about the label is not shown: it needs classes."
            self.record["panels"]["information"], self.record["information"] = {"not_shown": reason}, []
            return
        say(f"{self.name}: information in {len(self.layers)} layers")
        found = _information_card.information(self.net, self.layers, self.x, self.y, bins)
        self.cards.append(_information_card.information_card(self.name, found, len(self.x), self.y))
        self.record["information"] = found["table"].reset_index().to_dict("records")

    def write(self, output: Path) -> None:
        """Write the report, with what could not be told."""
        from torchfolio.cli._inside import missing_card
        from torchfolio.report.sheet import write_sheet

        told = {
            **self.record.get("training", {}),
            "size": self.record.get("size", {}),
            "losses": self.record["losses"],
            **self.record["panels"],
        }
        write_sheet(output, f"inside {self.name}", [*filter(None, self.cards), *missing_card(told)])
        self.record = {"report": str(output), **self.record}


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
