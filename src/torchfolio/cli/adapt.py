"""The command that merges networks, or adapts one to data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio import catalog
from torchfolio.cli._alike import check_alike
from torchfolio.cli._network import (
    call_with,
    fitting_splits,
    normalized,
    numbered_alike,
    own_rule,
    parse_settings,
    predictor_of,
    say,
    seen_so_far,
    show_result,
)
from torchfolio.cli._options import (
    ALLOW_HELP,
    MOST_SEED,
    Device,
    Force,
    TestSize,
    TrainSize,
    alone,
    check_output,
    check_outputs,
    named,
)
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import TensorDataset

    from torchfolio.adaptation.adapter import Adapter
    from torchfolio.adaptation.merge import Merge
    from torchfolio.bundle import Bundle, Manifest, Outline


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(adapt)


def adapt(
    networks: Annotated[list[Path], typer.Argument(help="One bundle to adapt, or two and more to merge.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle that is written.")],
    method: Annotated[
        str | None, typer.Option(help="Slug of a method that merges or adapts, or an ordinary way to merge.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Bundle they were finetuned from; every way to merge but average needs it.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Data of all networks, or once for each of them in their order.", callback=named),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Last module, which every network keeps as its own head (for example: head).")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method, key=value.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help=ALLOW_HELP)] = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Seed of masks, order and whatever a method draws.")
    ] = 0,
    device: Device = "auto",
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge finetuned networks into one, or adapt one network to data; with data, show accuracies before and after.

    Methods that merge see the inputs of the training split, never its labels; methods that adapt see both.

    Example: torchfolio adapt --method average netA/ netB/ --data cifar10 -o merged/
    """
    from torchfolio.engine.devices import resolve_device

    way, path = _method(method, len(networks))
    settings, place = parse_settings(setting), resolve_device(device)
    allow = importable(allow or [])
    sizes = {"seed": seed, "test_size": test_size}
    if way == "merge":
        folders = [output] if keep is None else _folders(output, networks)
        with alone(output, lambda: check_outputs(folders, force)):
            _merge_all(path, settings, networks, base, data or [], keep, output, allow, sizes, place, as_json)
    elif base is not None or keep is not None:
        raise TorchfolioError(f"{path} adapts one network: leave {'--base' if base is not None else '--keep'} out")
    elif len(data or []) != 1:
        raise TorchfolioError(f"{path} adapts to data: name them once with --data, got {len(data or [])}")
    else:
        assert data is not None
        sizes["train_size"] = train_size
        with alone(output, lambda: check_output(output, force)):
            _adapt_one(path, settings, networks[0], data[0], output, allow, sizes, place, as_json)


def _folders(output: Path, networks: Sequence[Path]) -> list[Path]:
    """Where networks that keep their heads go, each to a folder of its own."""
    return [output / f"{i}-{name.resolve().name}" for i, name in enumerate(networks)]


def _method(name: str | None, networks: int) -> tuple[str, str]:
    """`"merge"` or `"adapter"`, and the name of the method."""
    from torchfolio.adaptation.merge import ORDINARY

    known = {"merge": [*ORDINARY, *catalog.offering("merge")], "adapter": list(catalog.offering("adapter"))}
    if name is None:
        offered = list(catalog.offering("merge"))
        if networks < 2 or len(offered) != 1:
            said = known["adapter" if networks < 2 else "merge"]
            raise typer.BadParameter(f"name one of {', '.join(said)}", param_hint="--method")
        return "merge", offered[0]
    way = next((kind for kind, names in known.items() if name in names), None)
    if way is None:
        every = ", ".join([*known["merge"], *known["adapter"]])
        raise typer.BadParameter(f"expected {every}, got {name!r}", param_hint="--method")
    if way == "merge" and networks < 2:
        raise typer.BadParameter(f"expected two networks or more to merge, got {networks}", param_hint="NETWORKS")
    if way == "adapter" and networks != 1:
        raise typer.BadParameter(f"{name} adapts one network, got {networks}", param_hint="NETWORKS")
    return way, name


def _factory(way: str, name: str) -> Any:
    """The class of a method."""
    from torchfolio.adaptation.merge import ORDINARY

    return catalog.load_name(ORDINARY[name]) if name in ORDINARY else catalog.offered(name, way)


def _make(factory: Any, name: str, settings: dict[str, Any], own: dict[str, Any]) -> Any:
    """The method with the user's settings, and those of `own` that it takes."""
    import inspect

    taken = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    own = {k: v for k, v in own.items() if k in taken or open_ended}
    return call_with(factory, {**own, **settings}, name)


def _adapt_one(
    name: str,
    settings: dict[str, Any],
    folder: Path,
    source: str,
    output: Path,
    allow: list[str],
    sizes: dict[str, Any],
    place: Any,
    as_json: bool,
) -> None:
    """Adapt one network to data, and write it as a bundle with the figures of the data's test split."""
    from dataclasses import replace

    from torchfolio.bundle import load_bundle, save_bundle

    method: Adapter = _make(_factory("adapter", name), name, settings, {})
    bundle = load_bundle(folder, allow=allow, device=place)
    manifest = bundle.manifest
    if own_rule(bundle, allow) is not None:
        raise TorchfolioError(
            f"{folder} answers by its learning rule, {manifest.training.get('rule')}, and {name} adapts networks that "
            "answer by their plain outputs; train it on by train --start"
        )
    splits = fitting_splits(replace(manifest, classes=()), str(folder), source, **sizes)
    same = set(splits.classes) == set(manifest.classes)
    if same:
        splits = numbered_alike(manifest, str(folder), source, splits)
    train, val, test = (normalized(getattr(splits, k), manifest.mean, manifest.std) for k in ("train", "val", "test"))
    before = _score(predictor_of(bundle, allow), test, place)[1] if same else None
    done = method.adapt(
        bundle.model, train, val=val if len(val) else None, num_classes=len(splits.classes), seed=sizes["seed"],
        device=place, say=say,
    )  # fmt: skip
    recipe = method.recipe({"build": manifest.build, "arguments": manifest.arguments})
    record = {"adapted": str(folder), "method": name, "settings": settings, "data": source, **dict(done.report)}
    record |= {"split": splits.split_digest, "seen": seen_so_far(manifest, splits)}
    adapted = replace(
        manifest, **recipe, classes=tuple(splits.classes), training={**_lasting(manifest), **record}, tied={}
    )
    save_bundle(done.model, output, adapted)
    _, after = _score(predictor_of(load_bundle(output, allow=allow, device=place), allow), test, place)
    result: dict[str, Any] = {"method": name, "bundle": str(output), "before": before, "after": after, **done.report}
    show_result(result if as_json else {k: v for k, v in result.items() if v is not None}, as_json)


def _merge_all(
    name: str,
    settings: dict[str, Any],
    networks: Sequence[Path],
    base: Path | None,
    data: Sequence[str],
    keep: str | None,
    output: Path,
    allow: list[str],
    sizes: dict[str, Any],
    place: Any,
    as_json: bool,
) -> None:
    """Merge networks, and write one bundle, or one for every head that is kept."""
    from torchfolio.bundle import load_bundle

    factory = _factory("merge", name)
    paths = [*networks, *([base] if base else [])]
    outlines = _outlines(paths, allow) if factory.streams and keep is None else None
    opened: list[Any] = outlines or [load_bundle(folder, allow=allow, device=place) for folder in paths]
    bundles, start = opened[: len(networks)], opened[-1 if base else 0]
    check_alike([bundle.manifest for bundle in opened], paths, len(networks), keep is not None, allow)
    method: Merge = _make(factory, name, settings, {"seed": sizes["seed"], "input_range": _input_range(start)})
    if base is None and method.needs_base:
        raise TorchfolioError(f"{name} adds up what finetuning changed: name the network it started from with --base")
    if method.needs_inputs and not data:
        raise TorchfolioError(f"{name} learns from unlabelled inputs: name them with --data")
    if method.needs_inputs and not all(bundle.manifest.classes for bundle in bundles):
        raise TorchfolioError(f"{name} learns from the entropy over classes, and these networks tell none apart")
    examples = _examples(bundles, networks, data, sizes)
    before = []
    for bundle, folder, (_, test) in zip(bundles, networks, examples, strict=False):
        model = predictor_of(load_bundle(folder, allow=allow, device=place) if outlines else bundle, allow)
        before.append(_score(model, test, place))

    how = {"method": name, "settings": settings}
    if outlines:
        folders = [_stream(method, outlines, base is not None, networks, output, how)] * len(networks)
    else:
        bodies, heads = _split([start, *bundles], keep)
        inputs = [train.tensors[0] for train, _ in examples]
        merged = method.fit(bodies[0], bodies[1:], inputs, heads=heads and heads[1:])
        folders = _write(merged.model.state_dict(), bundles, keep, networks, output, how)

    rows = []
    for i, (folder, network) in enumerate(zip(folders, networks, strict=False)):
        row: dict[str, Any] = {"network": str(network), "bundle": str(folder)}
        if examples:
            model = predictor_of(load_bundle(folder, allow=allow, device=place), allow)
            measure, after = _score(model, examples[i][1], place)
            row |= {"measure": measure, "before": before[i][1], "after": after}
        rows.append(row)
    if as_json:
        show_result({"method": name, "output": str(output), "networks": rows}, True)
        return
    for row in rows:
        scores = f"  {row['measure']} {row['before']:.4f} before, {row['after']:.4f} after" if "before" in row else ""
        typer.echo(f"{row['network']} -> {row['bundle']}{scores}")


def _examples(
    bundles: Sequence[Bundle], names: Sequence[Path], data: Sequence[str], sizes: dict[str, Any]
) -> list[tuple[TensorDataset, TensorDataset]]:
    """Training and test split of every network, normalised as it was trained."""
    if not data:
        return []
    if len(data) not in (1, len(bundles)):
        raise TorchfolioError(f"expected --data once or {len(bundles)} times, got it {len(data)} times")
    sources = list(data) * len(bundles) if len(data) == 1 else data
    sets = []
    for bundle, name, source in zip(bundles, names, sources, strict=True):
        manifest = bundle.manifest
        splits = fitting_splits(manifest, str(name), source, **sizes)
        parts = (splits.train, splits.test)
        sets.append(tuple(normalized(part, manifest.mean, manifest.std) for part in parts))
    return sets


def _score(model: nn.Module, test: TensorDataset, device: Any) -> tuple[str, float]:
    """The accuracy on a test split, of a regression the loss; and its name."""
    from torchfolio import engine

    scores = engine.evaluate(model, test, device=device)
    return next((name, scores[name]) for name in ("accuracy", "loss") if name in scores)


def _split(bundles: Sequence[Bundle], keep: str | None) -> tuple[list[nn.Module], list[nn.Module] | None]:
    """Bodies that are merged and heads that are not; without `keep`, whole networks."""
    import copy

    from torch import nn

    if keep is None:
        return [bundle.model for bundle in bundles], None
    bodies, heads = [], []
    for bundle in bundles:
        body = copy.deepcopy(bundle.model)
        try:
            heads.append(body.get_submodule(keep))
        except AttributeError:
            known = ", ".join(name for name, _ in body.named_children())
            raise TorchfolioError(f"the network has no module {keep!r} to keep; it has {known}") from None
        body.set_submodule(keep, nn.Identity())
        bodies.append(body)
    return bodies, heads


def _lasting(manifest: Manifest) -> dict[str, Any]:
    """What of the record of a training is still so after its weights changed: the size of images, how it answers."""
    return {k: v for k, v in manifest.training.items() if k in ("image_size", "rule", "rule_settings", "predictor")}


def _input_range(bundle: Bundle) -> tuple[Any, Any] | None:
    """Range of normalised images, whose pixels lie in [0, 1]; features of tables have none."""
    manifest = bundle.manifest
    if len(manifest.input_shape) != 3:
        return None
    if not manifest.mean:
        return 0.0, 1.0
    pairs = list(zip(manifest.mean, manifest.std, strict=True))
    return [-m / s for m, s in pairs], [(1 - m) / s for m, s in pairs]


def _outlines(folders: Sequence[Path], allow: list[str]) -> list[Outline] | None:
    """Bundles that stay on disk, where all can."""
    from torchfolio.bundle import outline_bundle

    outlines = [outline_bundle(folder, allow=allow) for folder in folders]
    return [one for one in outlines if one] if all(outlines) else None


def _stream(
    method: Merge, outlines: Sequence[Outline], based: bool, names: Sequence[Path], output: Path, how: dict[str, Any]
) -> Path:
    """Write one bundle, merged tensor by tensor; the last outline is that of the base where there is one."""
    from dataclasses import replace

    from torchfolio.bundle import write_bundle

    start, first = outlines[-1 if based else 0], outlines[0].manifest
    files = [outline.weights for outline in outlines]
    training = {**_lasting(first), **_record(outlines[: len(names)], names, how)}

    def fill(path: Path) -> None:
        method.fit_files(start.model, start.weights if based else None, files[: len(names)], path)

    return write_bundle(output, replace(first, training=training), fill)


def _record(bundles: Sequence[Bundle], names: Sequence[Path], how: dict[str, Any]) -> dict[str, Any]:
    """How a merged network came about, and a sketch of all examples that its parts were trained on."""
    from torchfolio.data.seen import kept_in, sketch

    seen = sketch(mark for bundle in bundles for mark in kept_in(bundle.manifest.training.get("seen", "")))
    return {"merged": [str(name) for name in names], **how, "seen": seen}


def _write(
    state: dict[str, Any],
    bundles: Sequence[Bundle],
    keep: str | None,
    names: Sequence[Path],
    output: Path,
    how: dict[str, Any],
) -> list[Path]:
    """One bundle, or one for every head; the folder of every network's merged form."""
    from dataclasses import replace

    from torchfolio.bundle import save_bundle

    record = _record(bundles, names, how)

    def save(bundle: Bundle, folder: Path) -> Path:
        bundle.model.load_state_dict(state, strict=keep is None)
        training = {**_lasting(bundle.manifest), **record}
        return save_bundle(bundle.model, folder, replace(bundle.manifest, training=training))

    if keep is None:
        return [save(bundles[0], output)] * len(bundles)
    return [save(bundle, folder) for bundle, folder in zip(bundles, _folders(output, names), strict=True)]
