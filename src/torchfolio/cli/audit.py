"""The command that looks for backdoors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio import catalog
from torchfolio.cli._options import MOST_SEED, Allow, AsJson, Device, ImageSize, ModelSet, named
from torchfolio.cli.networks import call_with, importable, normalized, open_network, parse_settings
from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch import Tensor

    from torchfolio.backdoor.detectors import InputDetector, ModelDetector
    from torchfolio.bundle import Bundle, Manifest

FORMAT = 1
SUSPICIOUS = 1
RECORD, PAGE, NETWORK = "audit.json", "index.html", "net"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(audit)


def audit(
    folder: Annotated[Path | None, typer.Argument(help="Bundle to audit, or a filter that audit wrote.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Clean examples: named data set, hf:owner/name, image folder.", callback=named)
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--input", help="Image or folder of images to try a filter on.")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Slug of a method that detects backdoors; the one that filters inputs by default."),
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method, key=value.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the filter and its page.")] = Path("audit"),
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            help="Bundle of a clean network for the same task, for a method that compares; 19 allow a verdict."
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of clean networks that may be called suspicious.")] = 0.05,
    model: Annotated[str | None, typer.Option(help="Reference network or package.module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its weights, a safetensors file.")] = None,
    model_set: ModelSet = None,
    normalize: Annotated[
        bool, typer.Option(help="With --model: normalise inputs by the constants of the data, or leave them in [0, 1].")
    ] = True,
    allow: Allow = None,
    budget: Annotated[float | None, typer.Option(help="Time limit for a method that judges networks, seconds.")] = None,
    size: Annotated[int, typer.Option(min=2, max=10**9, help="Clean examples that are used, at most.")] = 2000,
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of subsets, order and split.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Fit a backdoor detector to a network, or try inputs with a filter that was fitted.

    Exit code 1 says that something suspicious was found: an input above the filter's threshold, or a network that
    stands out from clean reference networks. 0 says that nothing was, which is no proof that nothing is there.

    Example: torchfolio audit net/ --data clean/ -o filter/ && torchfolio audit filter/ --input photos/
    """
    allowed = importable([*(allow or []), *([model] if model and ":" in model else [])])
    if (data is None) == (inputs is None):
        raise TorchfolioError("expected either --data, clean examples to fit a detector, or --input, images to try")
    if inputs is not None:
        if folder is None or model is not None or weights is not None or reference:
            raise TorchfolioError(
                "--input takes the folder of a filter and nothing else: torchfolio audit filter/ --input x.png"
            )
        _try(folder, inputs, allowed, device, as_json)
        return
    assert data is not None
    if not 0 < alpha < 1:
        raise typer.BadParameter(f"expected a number between 0 and 1, got {alpha}", param_hint="--alpha")
    if budget is not None and not budget > 0:
        raise typer.BadParameter(f"expected a number above 0, got {budget}", param_hint="--budget")
    _refuse_strangers(output)
    if folder is not None and (folder / RECORD).is_file():
        raise TorchfolioError(f"{folder} is a filter already; try it with --input")
    detector = _default() if detector is None else detector
    references = _references(reference or [], allowed, device)
    own = {
        "seed": seed,
        "device": _place(device),
        "alpha": alpha,
        "references": [bundle.model for bundle in references],
    }
    inputs_by, network_by = _detectors(detector, parse_settings(setting), own)
    source, splits = open_network(folder, model, weights, model_set, allowed, data, image_size, {"seed": seed})
    if model is not None and not normalize:
        source = replace(source, manifest=replace(source.manifest, mean=(), std=()))
    _check_alike(source, references, reference or [])
    name = str(folder) if folder is not None else f"{model} with {weights}"
    _say(f"{detector}: fitting to {name} on clean examples of {data}")
    clean = _examples(splits, source.manifest, size, seed)
    source.model.to(_place(device))
    classes = source.manifest.classes or tuple(map(str, range(_outputs(source, clean[0]))))
    report: dict[str, Any] = {"network_name": name, "detector": detector, "examples": len(clean[0]), "notes": []}
    with _noting(report["notes"]):
        found = [
            *([_filter(inputs_by, source, clean, classes)] if inputs_by is not None else []),
            *([_network(network_by, source, clean, classes, seed, budget)] if network_by is not None else []),
        ]
    report |= found[0][0] | ({"network": found[1][0]} if len(found) > 1 else {})
    kind = "inputs" if inputs_by is not None else "model"
    _write(output, inputs_by, source, report, [picture for _, pictures in found for picture in pictures], kind)
    _show(report, output, as_json)
    if any(part["suspicious"] for part, _ in found):
        raise typer.Exit(SUSPICIOUS)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _place(device: str) -> Any:
    from torchfolio.engine.evaluate import resolve_device

    return resolve_device(device)


def _detectors(slug: str, settings: dict[str, Any], own: dict[str, Any]) -> tuple[Any, Any]:
    """The method's detector of inputs and its detector of networks; `None` for what it has not.

    One that judges inputs judges the network too only where it is given references.
    """
    factories = [_offered(slug, kind) for kind in ("input_detector", "model_detector")]
    if factories == [None, None]:
        known = sorted({*catalog.offering("input_detector"), *catalog.offering("model_detector")})
        raise TorchfolioError(f"{slug} is not a detector of backdoors; these are: {', '.join(known)}")
    compares = factories[1] is not None and "references" in _parameters(factories[1])
    if own["references"] and not compares:
        raise TorchfolioError(f"{slug} compares no networks: leave --reference out")
    if compares and not own["references"]:
        if factories[0] is None:
            raise TorchfolioError(f"{slug} compares a network with clean ones: name some with --reference")
        factories[1] = None
    elif factories[0] is not None and not compares:
        factories[1] = None
    taken = {name for factory in factories if factory is not None for name in _parameters(factory)}
    strangers = {k: v for k, v in settings.items() if k not in taken}
    made = []
    for factory in factories:
        known = {} if factory is None else _parameters(factory)
        chosen = {k: v for k, v in {**own, **settings}.items() if k in known}
        made.append(factory and call_with(factory, {**chosen, **strangers}, f"the method {slug}"))
    return made[0], made[1]


def _offered(slug: str, kind: str) -> Any:
    """What a method offers of a kind, or `None`."""
    if not catalog.paper(slug).is_in:
        raise TorchfolioError(f"{slug} is in the catalogue but its method is not in yet")
    return catalog.offered(slug, kind) if slug in catalog.offering(kind) else None


def _default() -> str:
    """The method that filters inputs, where there is one alone."""
    known = list(catalog.offering("input_detector"))
    if len(known) != 1:
        raise TorchfolioError(f"name a method with --detector: {', '.join(known)}")
    return known[0]


def _parameters(factory: Any) -> Any:
    import inspect

    return inspect.signature(factory).parameters


def _references(folders: Sequence[Path], allow: list[str], device: str) -> list[Bundle]:
    """Clean networks to compare with."""
    from torchfolio.bundle import load_bundle

    return [load_bundle(folder, allow=allow, device=_place(device)) for folder in folders]


def _check_alike(source: Bundle, references: Sequence[Bundle], folders: Sequence[Path]) -> None:
    for bundle, folder in zip(references, folders, strict=True):
        if (bundle.manifest.input_shape, bundle.manifest.mean) != (source.manifest.input_shape, source.manifest.mean):
            raise TorchfolioError(f"{folder} takes other inputs than the network that is audited; it is no reference")


def _examples(splits: Any, manifest: Manifest, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most so many of all clean examples, drawn at random and normalised for the network."""
    import torch
    from torch.utils.data import TensorDataset

    parts = [getattr(splits, part).tensors for part in ("train", "val", "test")]
    x, y = (torch.cat([part[i] for part in parts]) for i in range(2))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
    x, y = normalized(TensorDataset(x[chosen], y[chosen]), manifest.mean, manifest.std).tensors
    return x, y


def _outputs(source: Bundle, x: Tensor) -> int:
    from torchfolio.backdoor.metrics import outputs_of

    return outputs_of(source.model, x[:1]).shape[-1]


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Collect warnings of a method as notes, and say them."""
    import warnings

    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)
        yield
    notes += dict.fromkeys(str(w.message) for w in raised if issubclass(w.category, UserWarning))
    for note in notes:
        _say(f"note: {note}")


Report = tuple[dict[str, Any], list[tuple[Any, str]]]


def _network(
    made: ModelDetector,
    source: Bundle,
    clean: tuple[Tensor, Tensor],
    classes: Sequence[str],
    seed: int,
    budget: float | None,
) -> Report:
    """What a detector of backdoored networks says, and its pictures."""
    verdict = made.scan(source.model, clean, seed=seed, budget_seconds=budget)
    report = {
        "suspicious": verdict.is_backdoored, "score": verdict.score, "threshold": verdict.threshold,
        "pairs": [list(pair) for pair in verdict.pairs], "complete": verdict.complete,
        "evidence": {k: v for k, v in verdict.evidence.items() if isinstance(v, int | float | str)},
        "sentences": verdict.sentences(classes),
    }  # fmt: skip
    return report, made.pictures(verdict, classes)


def _filter(made: InputDetector, source: Bundle, clean: tuple[Tensor, Tensor], classes: Sequence[str]) -> Report:
    """What a fitted filter of inputs promises, and its pictures. That it was fitted says nothing about the network."""
    from torchfolio.backdoor.audit import false_positives
    from torchfolio.backdoor.concentration import percent

    made.fit(source.model, clean)
    share = false_positives(made.calibration_, made.threshold_)
    report: dict[str, Any] = {
        "suspicious": False, "threshold": made.threshold_, "calibration_examples": share.n,
        "false_positives": {"expected": share.expected, "low": share.low, "high": share.high, "level": share.level},
        "figures": made.figures(),
        "sentences": [
            "The filter is ready. Whether the network has a backdoor cannot be told from clean examples alone.",
            f"Of clean inputs that the network gets right, the filter will reject about {percent(share.expected)} "
            f"({percent(share.low)} to {percent(share.high)}, 95 % interval from {share.n} held-out examples), if they "
            "are like the clean examples. How many triggered inputs it catches is not known: none was seen.",
            *made.remarks(clean[0], classes),
        ],
    }  # fmt: skip
    return report, [_histogram(made), *made.pictures(clean[0], classes)]


def _histogram(made: InputDetector) -> tuple[Any, str]:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    # A few clean inputs score so low that they would squeeze all others.
    scores = made.calibration_.double()
    ax.hist(scores.clamp_min(float(scores.quantile(0.1))).numpy(), bins=40)
    ax.axvline(made.threshold_, c="k", ls="--")
    ax.set(xlabel="suspicion", ylabel="clean examples")
    return fig, "Scores of held-out clean examples (the lowest tenth at its edge), and the threshold."


def _refuse_strangers(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not (output / RECORD).is_file():
        raise TorchfolioError(f"{output} exists and is no audit; name another folder with -o")


def _write(
    output: Path, made: InputDetector | None, source: Bundle, report: dict[str, Any], pictures: list[Any], kind: str
) -> None:
    """The filter with the network that it is for, the page, and last the record that makes it readable."""
    from torchfolio.bundle import save_bundle
    from torchfolio.report.sheet import Picture, Sheet, Table, write_sheet
    from torchfolio.runs.store import write_json

    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD).unlink(missing_ok=True)
    if made is not None:
        save_bundle(source.model, output / NETWORK, source.manifest)
        made.save(output)
    compared = report.get("network", {"suspicious": False, "sentences": []})
    suspicious = report["suspicious"] or compared["suspicious"]
    both = [report["sentences"], compared["sentences"]]
    headline, *sentences = [text for part in (both[::-1] if compared["suspicious"] else both) for text in part]
    card = Sheet(
        headline, report["detector"], ("suspicious", "fails") if suspicious else ("nothing found", "unmeasured"), sentences,
        report["notes"], [Table(("figure", "value"), tuple(_figures(report).items()))],
        [Picture(*pair) for pair in pictures],
    )  # fmt: skip
    write_sheet(output / PAGE, f"audit of {report['network_name']}", [card])
    write_json(output / RECORD, {"format": FORMAT, "kind": kind, **report})


def _figures(report: dict[str, Any]) -> dict[str, str]:
    rows = {"clean examples": str(report["examples"]), "threshold": f"{report['threshold']:.4g}"}
    for name, value in report.get("figures", {}).items():
        rows[name] = f"{value:.3f}"
    if share := report.get("false_positives"):
        rows["false positives"] = f"{share['expected']:.4f} ({share['low']:.4f} to {share['high']:.4f})"
    return rows


def _show(report: dict[str, Any], output: Path, as_json: bool) -> None:
    from torchfolio.runs.store import to_json

    if as_json:
        typer.echo(to_json({"audit": str(output), **report}))
        return
    for sentence in [*report["sentences"], *report.get("network", {"sentences": []})["sentences"]]:
        typer.echo(sentence)
    for key, value in {"audit": str(output), "page": str(output / PAGE), **_figures(report)}.items():
        typer.echo(f"{key:>26}  {value}")


def _try(folder: Path, inputs: Path, allow: list[str], device: str, as_json: bool) -> None:
    """Score images with a filter."""
    from torchfolio.backdoor.audit import chance, p_values
    from torchfolio.bundle import load_bundle
    from torchfolio.engine.evaluate import resolve_device
    from torchfolio.runs.store import to_json

    record = _record(folder)
    source = load_bundle(folder / NETWORK, allow=allow, device=resolve_device(device))
    factory = _offered(record["detector"], "input_detector")
    if factory is None:
        raise TorchfolioError(f"{record['detector']}, which made {folder}, is no filter of inputs")
    loaded = factory.load(folder, source.model)
    names, x = _images(inputs, source.manifest)
    judged = loaded.judge(x)
    p = p_values(loaded.calibration_, judged.scores)
    classes = source.manifest.classes
    rows = [
        {"input": name, "label": classes[int(label)] if classes else int(label), "score": float(score),
         "p_value": float(value), "suspicious": bool(reject)}
        for name, label, score, value, reject in zip(names, judged.labels, judged.scores, p, judged.rejected, strict=True)
    ]  # fmt: skip
    found = int(judged.rejected.sum())
    odds = chance(loaded.calibration_, loaded.threshold_, len(rows), found)
    expected = len(rows) * record["false_positives"]["expected"]
    if as_json:
        typer.echo(to_json({"filter": str(folder), "inputs": rows, "suspicious": found, "expected_if_clean": expected,
                               "chance_if_clean": odds, "threshold": loaded.threshold_}))  # fmt: skip
    else:
        for row in sorted(rows, key=lambda row: -row["score"]):
            if row["suspicious"] or len(rows) <= 20:
                mark = "suspicious" if row["suspicious"] else "passes"
                typer.echo(f"{mark:>10}  p {row['p_value']:.4f}  {row['label']}  {row['input']}")
        typer.echo(
            f"{found} of {len(rows)} inputs are suspicious. Were all of them clean and like the examples of the audit, "
            f"{expected:.2g} would be expected, and {found} or more with probability {odds:.2g}."
        )
    if found:
        raise typer.Exit(SUSPICIOUS)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise TorchfolioError(
            f"{folder} is no filter: it has no {RECORD}; make one with torchfolio audit net/ --data clean/"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TorchfolioError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise TorchfolioError(f"{path} is not of format {FORMAT}; make the filter again")
    if record["kind"] != "inputs":
        raise TorchfolioError(f"{record['detector']} judges networks, not inputs: it left no filter in {folder}")
    return record


def _images(inputs: Path, manifest: Manifest) -> tuple[list[str], Tensor]:
    """Images of a file or a folder, of the network's shape and normalised for it."""
    import torch
    from torch.utils.data import TensorDataset

    from torchfolio.data.images import SUFFIXES, decode, visible

    if not inputs.exists():
        raise FileNotFoundError(f"there is no file or folder {inputs}")
    paths = visible(inputs, SUFFIXES) if inputs.is_dir() else [inputs]
    if not paths:
        raise TorchfolioError(f"{inputs} holds no images")
    if len(manifest.input_shape) != 3:
        raise TorchfolioError(f"the network takes inputs of shape {manifest.input_shape}, not images")
    channels, height, width = manifest.input_shape
    x = torch.from_numpy(decode(paths, [str(p) for p in paths], width if width == height else None)).float() / 255
    if x.shape[1] == 1 and channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if tuple(x.shape[1:]) != manifest.input_shape:
        raise TorchfolioError(
            f"the network takes inputs of shape {manifest.input_shape}, {inputs} has {tuple(x.shape[1:])}"
        )
    x = normalized(TensorDataset(x), manifest.mean, manifest.std).tensors[0]
    return [str(p) for p in paths], x
