"""The command that merges networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio.cli.networks import ALLOW_HELP, call_with, importable, normalized, parse_settings, show_result
from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import TensorDataset

    from torchfolio.bundle import Bundle

METHODS = ("average", "task_arithmetic", "adamerging", "concrete", "dam")
LEARNED = METHODS[2:]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(adapt)


def adapt(
    networks: Annotated[list[Path], typer.Argument(help="Bundles finetuned from one network, two or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged bundle.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "dam",
    base: Annotated[
        Path | None, typer.Option(help="Bundle they were finetuned from; every method but average needs it.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Data of all networks, or once for each of them in their order.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Last module, which every network keeps as its own head (for example: head).")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method, key=value.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help=ALLOW_HELP)] = None,
    test_size: Annotated[int | None, typer.Option(help="Evaluate on so many test examples.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of masks and of the order of inputs.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge finetuned networks into one; with data, show their accuracies before and after.

    dam, concrete and adamerging learn from the inputs of the training split, whose labels they never see.

    Example: torchfolio adapt --method dam --base net0/ netA/ netB/ --data cifar10 -o merged/
    """
    from torchfolio.bundle import load_bundle
    from torchfolio.engine.evaluate import resolve_device

    if method not in METHODS:
        raise typer.BadParameter(f"expected {', '.join(METHODS)}, got {method!r}", param_hint="--method")
    if len(networks) < 2:
        raise typer.BadParameter(f"expected two networks or more, got {len(networks)}", param_hint="NETWORKS")
    if base is None and method != "average":
        raise TorchfolioError(f"{method} adds up what finetuning changed: name the network it started from with --base")
    if method in LEARNED and not data:
        raise TorchfolioError(f"{method} learns from unlabelled inputs: name them with --data")
    place = resolve_device(device)
    allow = importable(allow or [])
    bundles = [load_bundle(folder, allow=allow, device=place) for folder in networks]
    start = load_bundle(base, allow=allow, device=place) if base else bundles[0]
    examples = _examples(bundles, networks, data or [], test_size, seed)
    before = [_accuracy(bundle.model, test, place) for bundle, (_, test) in zip(bundles, examples, strict=False)]

    bodies, heads = _split([start, *bundles], keep)
    inputs = [train.tensors[0] for train, _ in examples]
    merged = _merge(method, bodies[0], bodies[1:], heads[1:], inputs, start, parse_settings(setting), seed)
    folders = _write(merged, bundles, start, keep, networks, output, method, parse_settings(setting))

    rows = []
    for i, (folder, name) in enumerate(zip(folders, networks, strict=False)):
        row: dict[str, Any] = {"network": str(name), "bundle": str(folder)}
        if examples:
            model = load_bundle(folder, allow=allow, device=place).model
            row |= {"before": before[i], "after": _accuracy(model, examples[i][1], place)}
        rows.append(row)
    if as_json:
        show_result({"method": method, "output": str(output), "networks": rows}, True)
        return
    for row in rows:
        scores = f"  accuracy {row['before']:.4f} before, {row['after']:.4f} after" if "before" in row else ""
        typer.echo(f"{row['network']} -> {row['bundle']}{scores}")


def _examples(
    bundles: Sequence[Bundle], names: Sequence[Path], data: Sequence[str], test_size: int | None, seed: int
) -> list[tuple[TensorDataset, TensorDataset]]:
    """Training and test split of every network, normalised as it was trained."""
    from torchfolio.data import load

    if not data:
        return []
    if len(data) not in (1, len(bundles)):
        raise TorchfolioError(f"expected --data once or {len(bundles)} times, got it {len(data)} times")
    sources = list(data) * len(bundles) if len(data) == 1 else data
    found = []
    for bundle, name, source in zip(bundles, names, sources, strict=True):
        manifest = bundle.manifest
        splits = load(
            source, seed=seed, image_size=manifest.training.get("image_size"), test_size=test_size, normalize=False
        )
        if splits.shape != manifest.input_shape:
            raise TorchfolioError(f"{name} takes inputs of shape {manifest.input_shape}, {source} has {splits.shape}")
        parts = (splits.train, splits.test)
        found.append(tuple(normalized(part, manifest.mean, manifest.std) for part in parts))
    return found


def _accuracy(model: nn.Module, test: TensorDataset, device: Any) -> float:
    from torchfolio import engine

    return engine.evaluate(model, test, device=device)["accuracy"]


def _split(bundles: Sequence[Bundle], keep: str | None) -> tuple[list[nn.Module], list[nn.Module] | list[None]]:
    """Bodies that are merged and heads that are not; without `keep`, whole networks."""
    import copy

    from torch import nn

    if keep is None:
        return [bundle.model for bundle in bundles], [None] * len(bundles)
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


def _merge(
    method: str,
    base: nn.Module,
    nets: Sequence[nn.Module],
    heads: Sequence[Any],
    inputs: Sequence[Any],
    start: Bundle,
    settings: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """State dict of the merged network, or of its body where heads are kept."""
    from torchfolio.adaptation import dam, merging

    if method == "average":
        call_with(lambda: None, settings, method)
        return merging.average(nets)
    if method == "task_arithmetic":
        return call_with(lambda weight=0.3: merging.task_arithmetic(base, nets, weight), settings, method)
    classes = {"adamerging": merging.AdaMerging, "concrete": dam.ConcreteMerging, "dam": dam.DefenseAwareMerging}
    defaults: dict[str, Any] = {"seed": seed}
    if method != "adamerging":
        defaults["input_range"] = _input_range(start)
    learned = call_with(classes[method], {**defaults, **settings}, method)
    result = learned.fit(base, nets, inputs, heads=None if heads[0] is None else list(heads))
    return result.model.state_dict()


def _input_range(bundle: Bundle) -> tuple[Any, Any] | None:
    """Range of normalised images, whose pixels lie in [0, 1]; features of tables have none."""
    manifest = bundle.manifest
    if len(manifest.input_shape) != 3:
        return None
    if not manifest.mean:
        return 0.0, 1.0
    pairs = list(zip(manifest.mean, manifest.std, strict=True))
    return [-m / s for m, s in pairs], [(1 - m) / s for m, s in pairs]


def _write(
    state: dict[str, Any],
    bundles: Sequence[Bundle],
    start: Bundle,
    keep: str | None,
    names: Sequence[Path],
    output: Path,
    method: str,
    settings: dict[str, Any],
) -> list[Path]:
    """One bundle, or one for every head; the folder of every network's merged form."""
    from dataclasses import replace

    from torchfolio.bundle import save_bundle

    record = {"merged": [str(name) for name in names], "method": method, "settings": settings}

    def save(bundle: Bundle, folder: Path) -> Path:
        bundle.model.load_state_dict(state, strict=keep is None)
        size = {k: v for k, v in bundle.manifest.training.items() if k == "image_size"}
        return save_bundle(bundle.model, folder, replace(bundle.manifest, training={**size, **record}))

    if keep is None:
        return [save(start, output)] * len(bundles)
    return [
        save(bundle, output / f"{i}-{name.resolve().name}")
        for i, (bundle, name) in enumerate(zip(bundles, names, strict=True))
    ]
