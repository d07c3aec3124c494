"""The command that looks for backdoors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from torchfolio import catalog
from torchfolio.cli._network import call_with, normalized, open_network, parse_settings
from torchfolio.cli._objectives import settings_by_name
from torchfolio.cli._options import MOST_SEED, Allow, AsJson, Device, ImageSize, ModelSet, named
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchfolio.backdoor.detectors import InputDetector, ModelDetector
    from torchfolio.bundle import Bundle, Manifest

FORMAT = 1
SUSPICIOUS = 1
RECORD, PAGE, NETWORK = "audit.json", "index.html", "net"
KINDS = ("input_detector", "model_detector")


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
        typer.Option(
            help="Slug of a method that detects backdoors, or several with commas between; the one that filters inputs "
            "by default."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of the method, key=value; of one of several, slug.key=value."),
    ] = None,
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
    vocabulary: Annotated[
        Path | None, typer.Option(help="File of a text classifier's words, one a line, in the order of their ids.")
    ] = None,
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

    Example: torchfolio audit text-net/ --detector tminer --vocabulary words.txt
    """
    allowed = importable([*(allow or []), *([model] if model and ":" in model else [])])
    if (data is None) == (inputs is None) and not (data is None and _needs_no_data(detector)):
        raise TorchfolioError("expected either --data, clean examples to fit a detector, or --input, images to try")
    if inputs is not None:
        if folder is None or model is not None or weights is not None or reference:
            raise TorchfolioError(
                "--input takes the folder of a filter and nothing else: torchfolio audit filter/ --input x.png"
            )
        _try(folder, inputs, allowed, device, as_json)
        return
    if not 0 < alpha < 1:
        raise typer.BadParameter(f"expected a number between 0 and 1, got {alpha}", param_hint="--alpha")
    if budget is not None and not budget > 0:
        raise typer.BadParameter(f"expected a number above 0, got {budget}", param_hint="--budget")
    _refuse_strangers(output)
    if folder is not None and (folder / RECORD).is_file():
        raise TorchfolioError(f"{folder} is a filter already; try it with --input")
    slugs = [_default()] if detector is None else [slug.strip() for slug in detector.split(",")]
    references = _references(reference or [], allowed, device)
    own = {
        "seed": seed,
        "device": _place(device),
        "alpha": alpha,
        "references": [bundle.model for bundle in references],
    }
    if data is None:
        source, splits = _alone(folder, allowed), None
    else:
        source, splits = open_network(folder, model, weights, model_set, allowed, data, image_size, {"seed": seed},
                                      scored=False)  # fmt: skip
    own["words"] = _words(vocabulary, source.manifest)
    methods = _methods(slugs, setting or [], own)
    if model is not None and not normalize:
        source = replace(source, manifest=replace(source.manifest, mean=(), std=()))
    _check_alike(source, references, reference or [])
    name = str(folder) if folder is not None else f"{model} with {weights}"
    clean = None if splits is None else _examples(splits, source.manifest, size, seed)
    source.model.to(_place(device))
    classes = source.manifest.classes
    if not classes and clean is not None:
        classes = tuple(map(str, range(_outputs(source, clean[0]))))
    parts: list[_Part] = []
    for slug, inputs_by, network_by in methods:
        _say(f"{slug}: {f'fitting to {name} on clean examples of {data}' if data else f'scanning {name} without data'}")
        notes: list[str] = []
        with _noting(notes):
            if inputs_by is not None and clean is not None:
                parts.append(_Part(slug, "inputs", *_filter(inputs_by, source, clean, classes)))
            if network_by is not None:
                parts.append(_Part(slug, "model", *_network(network_by, source, clean, classes, seed, budget)))
        parts[-1].notes.extend(notes)
    report = {"network_name": name, "examples": 0 if clean is None else len(clean[0]), **_report(parts, classes)}
    _write(output, next((by for _, by, _ in methods if by is not None), None), source, report, parts)
    _show(report, output, as_json)
    if any(part.report["suspicious"] for part in parts):
        raise typer.Exit(SUSPICIOUS)


@dataclass(frozen=True)
class _Part:
    """What one method says of the inputs (a filter) or of the network (a verdict)."""

    slug: str
    kind: Literal["inputs", "model"]
    report: dict[str, Any]
    pictures: list[tuple[Any, str]]
    notes: list[str] = field(default_factory=list)


def _report(parts: Sequence[_Part], classes: Sequence[str]) -> dict[str, Any]:
    """The record of an audit: the filter's figures first where there is one, then the verdicts on the network."""
    first = min(parts, key=lambda part: part.kind != "inputs")
    verdicts = [part for part in parts if part.kind == "model" and part is not first]
    report = {"detector": first.slug, "notes": [note for part in parts for note in part.notes], **first.report}
    if len({part.slug for part in parts}) == 1:
        return report | ({"network": verdicts[0].report} if verdicts else {})
    judged = {part.slug: part.report for part in parts if part.kind == "model"}
    return report | {"networks": judged, "together": _together(judged, classes)}


def _together(judged: dict[str, dict[str, Any]], classes: Sequence[str]) -> str:
    """One sentence on what several methods say of a network."""
    if not judged:
        return "No method judged the network itself."
    found = [slug for slug, report in judged.items() if report["suspicious"]]
    if not found:
        return f"No method finds a backdoor in the network ({', '.join(judged)}); that is no proof that it has none."
    said = f"{len(found)} of {len(judged)} methods that judge networks find a backdoor: {', '.join(found)}."
    targets = [{target for _, target in judged[slug]["pairs"]} for slug in found]
    common = set.intersection(*targets)
    if len(found) > 1:
        named = ", ".join(str(classes[k]) for k in sorted(common))
        said += f" They agree on the target {named}." if common else " They do not agree on a target."
    return said


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _place(device: str) -> Any:
    from torchfolio.engine.devices import resolve_device

    return resolve_device(device)


def _detectors(slug: str, settings: dict[str, Any], own: dict[str, Any]) -> tuple[Any, Any]:
    """The method's detector of inputs and its detector of networks; `None` for what it has not.

    One that judges inputs judges the network too only where it is given references.
    """
    factories = [_offered(slug, kind) for kind in KINDS]
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


def _methods(slugs: Sequence[str], pairs: Sequence[str], own: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every method with its detector of inputs and its detector of networks.

    A setting goes to all that take it, one that is given as `slug.key=value` to that method alone.
    """
    if len(set(slugs)) < len(slugs):
        raise TorchfolioError(f"expected every method once in --detector, got {', '.join(slugs)}")
    single = [pair for pair in pairs if pair.startswith(tuple(f"{slug}." for slug in slugs))]
    settings = parse_settings([pair for pair in pairs if pair not in single])
    singly = {slug: parse_settings(given) for slug, given in settings_by_name(slugs, single).items()}
    if len(slugs) == 1:
        return [(slugs[0], *_detectors(slugs[0], {**settings, **singly[slugs[0]]}, own))]
    taken = {slug: {name for kind in KINDS if (f := _offered(slug, kind)) is not None for name in _parameters(f)}
             for slug in slugs}  # fmt: skip
    for name in settings:
        if not any(name in names for names in taken.values()):
            raise TorchfolioError(f"none of the methods {', '.join(slugs)} has a setting {name!r}")
    compares = [slug for slug in slugs if "references" in taken[slug]]
    if own["references"] and not compares:
        raise TorchfolioError(f"none of the methods {', '.join(slugs)} compares networks: leave --reference out")
    methods = []
    for slug in slugs:
        chosen = {**{k: v for k, v in settings.items() if k in taken[slug]}, **singly[slug]}
        given = own if slug in compares else {**own, "references": []}
        methods.append((slug, *_detectors(slug, chosen, given)))
    if sum(by is not None for _, by, _ in methods) > 1:
        raise TorchfolioError(
            "only one method that filters inputs can be fitted at a time: the folder holds one filter"
        )
    return methods


def _needs_no_data(detector: str | None) -> bool:
    """Whether all methods judge networks, and without examples."""

    def alone(slug: str) -> bool:
        return _offered(slug, "input_detector") is None and not getattr(
            _offered(slug, "model_detector"), "needs_clean", True
        )

    return detector is not None and all(alone(slug.strip()) for slug in detector.split(","))


def _alone(folder: Path | None, allow: list[str]) -> Bundle:
    """A network without data; only a bundle says all that is needed of one."""
    from torchfolio.bundle import load_bundle

    if folder is None:
        raise TorchfolioError("without --data, expected the folder of a bundle")
    return load_bundle(folder, allow=allow)


def _words(path: Path | None, manifest: Manifest) -> list[str] | None:
    """The words of a text classifier: of a file, or of the record of its training; a detector checks their number."""
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise TorchfolioError(f"{path} is no text in UTF-8: {error}") from error
    words = manifest.training.get("vocabulary")
    if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise TorchfolioError(
            "the vocabulary in the bundle's record is no list of words; name a file with --vocabulary"
        )
    return words


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
    from torchfolio.measure import outputs

    return outputs(source.model, x[:1]).shape[-1]


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
    clean: tuple[Tensor, Tensor] | None,
    classes: Sequence[str],
    seed: int,
    budget: float | None,
) -> Report:
    """What a detector of backdoored networks says, and its pictures."""
    model = source.model
    if made.pixels and clean is not None:
        model, clean = _on_pixels(source, clean)
    verdict = made.scan(model, clean, seed=seed, budget_seconds=budget)
    report = {
        "suspicious": verdict.is_backdoored, "score": verdict.score, "threshold": verdict.threshold,
        "pairs": [list(pair) for pair in verdict.pairs], "complete": verdict.complete,
        "evidence": {k: v for k, v in verdict.evidence.items() if isinstance(v, int | float | str)},
        "sentences": verdict.sentences(classes),
    }  # fmt: skip
    return report, made.pictures(verdict, classes)


def _on_pixels(source: Bundle, clean: tuple[Tensor, Tensor]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network with its normalisation in front, and the examples as images in [0, 1]."""
    import torch
    from torch import nn

    from torchfolio.backdoor.zoo import Normalize

    mean, std = source.manifest.mean, source.manifest.std
    x, y = clean
    if mean:
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = x * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        # What normalising and going back has lost of 0 and 1.
        x = torch.where((x > -1e-4) & (x < 1 + 1e-4), x.clamp(0, 1), x)
        place = next((p.device for p in source.model.parameters()), x.device)
        return nn.Sequential(Normalize(mean, std).to(place), source.model), (x, y)
    return source.model, clean


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
    output: Path, made: InputDetector | None, source: Bundle, report: dict[str, Any], parts: list[_Part]
) -> None:
    """The filter with the network that it is for, the page, and last the record that makes it readable."""
    from torchfolio.bundle import save_bundle
    from torchfolio.report.sheet import write_sheet
    from torchfolio.runs.store import write_json

    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD).unlink(missing_ok=True)
    if made is not None:
        save_bundle(source.model, output / NETWORK, source.manifest)
        made.save(output)
    write_sheet(output / PAGE, f"audit of {report['network_name']}", _cards(report, parts))
    write_json(output / RECORD, {"format": FORMAT, "kind": "model" if made is None else "inputs", **report})


def _cards(report: dict[str, Any], parts: list[_Part]) -> list[Any]:
    """One card for one method; for several, one with what they say together and one each."""
    from torchfolio.report.sheet import Picture, Sheet, Table

    def card(eyebrow: str, of: Sequence[_Part], sentences: Sequence[str], rows: dict[str, str]) -> Sheet:
        badge = ("suspicious", "fails") if any(p.report["suspicious"] for p in of) else ("nothing found", "unmeasured")
        headline, *rest = sentences
        notes = [note for p in of for note in p.notes]
        pictures = [Picture(*pair) for p in of for pair in p.pictures]
        return Sheet(headline, eyebrow, badge, rest, notes, [Table(("figure", "value"), tuple(rows.items()))], pictures)

    if "together" not in report:
        ordered = sorted(parts, key=lambda part: not (part.kind == "model" and part.report["suspicious"]))
        sentences = [text for part in ordered for text in part.report["sentences"]]
        return [card(report["detector"], parts, sentences, _figures(report))]
    badge = ("suspicious", "fails") if any(p.report["suspicious"] for p in parts) else ("nothing found", "unmeasured")
    first = Sheet(report["together"], "all methods", badge)
    every = {"examples": report["examples"]}
    return [first, *(card(p.slug, [p], p.report["sentences"], _figures({**p.report, **every})) for p in parts)]


def _figures(report: dict[str, Any]) -> dict[str, str]:
    rows = {"clean examples": str(report["examples"])} if report["examples"] else {}
    rows["threshold"] = f"{report['threshold']:.4g}"
    if "score" in report:
        rows["score"] = f"{report['score']:.4g}"
    for name, value in report.get("figures", {}).items():
        rows[name] = f"{value:.3f}"
    if share := report.get("false_positives"):
        rows["false positives"] = f"{share['expected']:.4f} ({share['low']:.4f} to {share['high']:.4f})"
    return rows


def _show(report: dict[str, Any], output: Path, as_json: bool) -> None:
    from torchfolio.json_text import to_json

    if as_json:
        typer.echo(to_json({"audit": str(output), **report}))
        return
    judged = report.get("networks") or {"": report.get("network", {"sentences": []})}
    for sentence in [report["together"]] if "together" in report else []:
        typer.echo(sentence)
    if report.get("networks", {}).get(report["detector"]) is None:  # else its sentences come with the others
        for sentence in report["sentences"]:
            typer.echo(sentence)
    for slug, part in judged.items():
        for sentence in part["sentences"]:
            typer.echo(f"{slug}: {sentence}" if slug else sentence)
    for key, value in {"audit": str(output), "page": str(output / PAGE), **_figures(report)}.items():
        typer.echo(f"{key:>26}  {value}")


def _try(folder: Path, inputs: Path, allow: list[str], device: str, as_json: bool) -> None:
    """Score images with a filter."""
    from torchfolio.backdoor.audit import chance, p_values
    from torchfolio.bundle import load_bundle
    from torchfolio.engine.devices import resolve_device
    from torchfolio.json_text import to_json

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
