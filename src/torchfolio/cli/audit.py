"""The command that looks for backdoors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio import catalog
from torchfolio.cli.networks import (
    Allow,
    AsJson,
    Device,
    ImageSize,
    ModelSet,
    call_with,
    importable,
    normalized,
    open_network,
    parse_settings,
)
from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchfolio.backdoor.detectors import ModelVerdict
    from torchfolio.bundle import Bundle, Manifest

FORMAT = 1
SUSPICIOUS = 1
RECORD, PAGE, NETWORK = "audit.json", "index.html", "net"
# Rates that published networks were finetuned at say little about yours.
DEFAULTS = {"badexpert": {"unlearn_lr": "auto", "unlearn_batch": "auto", "finetune_batch": "auto"}}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(audit)


def audit(
    folder: Annotated[Path | None, typer.Argument(help="Bundle to audit, or a filter that audit wrote.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Clean examples: named data set, hf:owner/name, image folder.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--input", help="Image or folder of images to try a filter on.")
    ] = None,
    detector: Annotated[str, typer.Option(help="Slug of a method that detects backdoors.")] = "badexpert",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method, key=value.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the filter and its page.")] = Path("audit"),
    reference: Annotated[
        list[Path] | None, typer.Option(help="Bundle of a network for the same task that is clean; 19 allow a verdict.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of clean networks that may be called suspicious.")] = 0.05,
    model: Annotated[str | None, typer.Option(help="Reference network or package.module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its weights, a safetensors file.")] = None,
    model_set: ModelSet = None,
    normalize: Annotated[
        bool, typer.Option(help="With --model: normalise inputs by the constants of the data, or leave them in [0, 1].")
    ] = True,
    allow: Allow = None,
    size: Annotated[int, typer.Option(min=2, help="Clean examples that are used, at most.")] = 2000,
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(help="Seed of subsets, order and split.")] = 0,
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
    if reference and detector != "badexpert":
        raise TorchfolioError(f"--reference compares the experts of badexpert, which {detector} does not make")
    _refuse_strangers(output)
    chosen = parse_settings(setting)
    kind, made = _detector(detector, {**DEFAULTS.get(detector, {}), **chosen}, seed, device)
    if folder is not None and (folder / RECORD).is_file():
        raise TorchfolioError(f"{folder} is a filter already; try it with --input")
    source, splits = open_network(folder, model, weights, model_set, allowed, data, image_size, {"seed": seed})
    if model is not None and not normalize:
        source = replace(source, manifest=replace(source.manifest, mean=(), std=()))
    name = str(folder) if folder is not None else f"{model} with {weights}"
    _say(f"{detector}: fitting to {name} on clean examples of {data}")
    x, y = _examples(splits, source.manifest, size, seed)
    report = _fit(kind, made, source, (x, y), name, detector, device)
    if reference:
        # The figures in the documentation are of experts that were made so.
        alike = {"unlearn_lr": "auto", **chosen}
        report["network"] = _compare(source, reference, (x, y), alike, alpha, seed, allowed, device)
    _write(output, made, source, report, detector, kind)
    _show(report, output, as_json)
    if report["suspicious"] or report.get("network", {}).get("suspicious"):
        raise typer.Exit(SUSPICIOUS)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _detector(slug: str, settings: dict[str, Any], seed: int, device: str) -> tuple[str, Any]:
    """A new detector, and whether it judges `"inputs"` or the `"model"`."""
    import inspect

    from torchfolio.engine.evaluate import resolve_device

    kind = "model" if slug in catalog.offering("model_detector") else "inputs"
    factory = catalog.offered(slug, "model_detector" if kind == "model" else "input_detector")
    own = {"seed": seed, "device": resolve_device(device)}
    own = {k: v for k, v in own.items() if k in inspect.signature(factory).parameters}
    return kind, call_with(factory, {**own, **settings}, f"the method {slug}")


def _examples(splits: Any, manifest: Manifest, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most so many of all clean examples, drawn at random and normalised for the network."""
    import torch
    from torch.utils.data import TensorDataset

    parts = [getattr(splits, part).tensors for part in ("train", "val", "test")]
    x, y = (torch.cat([part[i] for part in parts]) for i in range(2))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
    x, y = normalized(TensorDataset(x[chosen], y[chosen]), manifest.mean, manifest.std).tensors
    return x, y


def _fit(
    kind: str, made: Any, source: Bundle, clean: tuple[Tensor, Tensor], name: str, detector: str, device: str
) -> dict[str, Any]:
    """Fit or scan; what was found, as a record."""
    import warnings

    from torchfolio.engine.evaluate import resolve_device

    net = source.model.to(resolve_device(device))
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)
        found = made.scan(net, clean) if kind == "model" else made.fit(net, clean)
    notes = list(dict.fromkeys(str(w.message) for w in raised if issubclass(w.category, UserWarning)))
    for note in notes:
        _say(f"note: {note}")
    report = {"network_name": name, "detector": detector, "examples": len(clean[0]), "notes": notes}
    return report | (_verdict(found) if kind == "model" else _calibration(made, source, clean))


def _verdict(found: ModelVerdict) -> dict[str, Any]:
    """What a detector of backdoored networks says."""
    compared = f"{found.score:.4g} against a threshold of {found.threshold:.4g}"
    word = "suspicious" if found.is_backdoored else "not suspicious"
    sentence = f"The network is {word}: its score is {compared}."
    return {"suspicious": found.is_backdoored, "score": found.score, "threshold": found.threshold,
            "pairs": [list(pair) for pair in found.pairs], "sentences": [sentence]}  # fmt: skip


def _calibration(made: Any, source: Bundle, clean: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What a fitted filter of inputs promises. That it was fitted says nothing about the network."""
    from torchfolio.backdoor.audit import concentration, false_positives

    threshold = float(made.threshold_)
    share = false_positives(made.calibration_, threshold)
    report: dict[str, Any] = {
        "suspicious": False, "threshold": threshold, "calibration_examples": share.n,
        "false_positives": {"expected": share.expected, "low": share.low, "high": share.high, "level": share.level},
        "accuracy": dict(getattr(made, "accuracy_", {})),
        "history": [list(row) for row in getattr(made, "history_", [])],
        "sentences": [
            "The filter is ready. Whether the network has a backdoor cannot be told from clean examples alone.",
            f"Of clean inputs that the network gets right, the filter will reject about {_percent(share.expected)} "
            f"({_percent(share.low)} to {_percent(share.high)}, 95 % interval from {share.n} held-out examples), if they "
            "are like the clean examples. How many triggered inputs it catches is not known: none was seen.",
        ],
    }  # fmt: skip
    expert = getattr(made, "expert_", None)
    if expert is not None:
        means = concentration(expert, clean[0])
        classes = source.manifest.classes or tuple(str(k) for k in range(len(means)))
        report["expert"] = dict(zip(classes, means.tolist(), strict=True))
        first = int(means.argmax())
        report["sentences"].append(
            f"On clean inputs the expert believes most in class {classes[first]} ({_percent(float(means[first]))} on "
            f"average; {_percent(1 / len(means))} each if it had no favourite). Experts of clean networks have favourites "
            "too: this counts only against reference networks (--reference)."
        )
    return report


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _compare(
    source: Bundle,
    references: Sequence[Path],
    clean: tuple[Tensor, Tensor],
    settings: dict[str, Any],
    alpha: float,
    seed: int,
    allow: list[str],
    device: str,
) -> dict[str, Any]:
    """The network against clean ones for the same task, all treated alike."""
    import warnings

    from torchfolio.backdoor.audit import ExpertConcentration
    from torchfolio.bundle import load_bundle
    from torchfolio.engine.evaluate import resolve_device

    place = resolve_device(device)
    nets: list[nn.Module] = []
    for folder in references:
        bundle = load_bundle(folder, allow=allow, device=place)
        if (bundle.manifest.input_shape, bundle.manifest.mean) != (source.manifest.input_shape, source.manifest.mean):
            raise TorchfolioError(f"{folder} takes other inputs than the network that is audited; it is no reference")
        nets.append(bundle.model)
    _say(f"comparing with {len(nets)} reference networks")
    scan = ExpertConcentration(nets, alpha, **{**settings, "seed": seed, "device": place})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as for the network itself
        found = scan.scan(source.model, clean)
    p, k = found.evidence["p_value"], len(nets)
    named = source.manifest.classes[found.evidence["class"]] if source.manifest.classes else found.evidence["class"]
    text = (
        f"{'More' if found.is_backdoored else 'Not more'} concentrated on one class ({named}) than clean networks are: p = "
        f"{p:.3g}, from {k} references. A clean network trained like them is called suspicious with probability at most "
        f"{_percent(alpha)}; a backdoored one may well be missed."
    )
    if k < scan.needed:
        text += f" With {k} references it cannot be called suspicious at all: that takes {scan.needed}."
    return {"suspicious": found.is_backdoored, "p_value": p, "alpha": alpha, "references": k, "class": str(named),
            "score": found.score, "sentence": text}  # fmt: skip


def _refuse_strangers(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not (output / RECORD).is_file():
        raise TorchfolioError(f"{output} exists and is no audit; name another folder with -o")


def _write(output: Path, made: Any, source: Bundle, report: dict[str, Any], detector: str, kind: str) -> None:
    """The filter with the network that it is for, the page, and last the record that makes it readable."""
    from torchfolio.bundle import save_bundle
    from torchfolio.report.sheet import Picture, Sheet, Table, write_sheet
    from torchfolio.runs.store import write_json

    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD).unlink(missing_ok=True)
    if kind == "inputs" and hasattr(made, "save"):
        save_bundle(source.model, output / NETWORK, source.manifest)
        made.save(output)
    compared = report.get("network", {})
    suspicious = bool(report["suspicious"] or compared.get("suspicious"))
    headline, *sentences = [
        *([compared["sentence"]] if compared.get("suspicious") else []), *report["sentences"],
        *([compared["sentence"]] if compared and not compared["suspicious"] else []),
    ]  # fmt: skip
    card = Sheet(
        headline, detector, ("suspicious", "fails") if suspicious else ("nothing found", "unmeasured"), sentences,
        report["notes"], [Table(("figure", "value"), tuple(_figures(report).items()))],
        [Picture(*pair) for pair in _pictures(made, report)],
    )  # fmt: skip
    write_sheet(output / PAGE, f"audit of {report['network_name']}", [card])
    write_json(output / RECORD, {"format": FORMAT, "kind": kind, **report})


def _figures(report: dict[str, Any]) -> dict[str, str]:
    rows = {"clean examples": str(report["examples"]), "threshold": f"{report['threshold']:.4g}"}
    for name, value in report.get("accuracy", {}).items():
        rows[f"accuracy of the {name}"] = f"{value:.3f}"
    if share := report.get("false_positives"):
        rows["false positives"] = f"{share['expected']:.4f} ({share['low']:.4f} to {share['high']:.4f})"
    return rows


def _pictures(made: Any, report: dict[str, Any]) -> list[tuple[Any, str]]:
    """Scores of the calibration examples, the course of unlearning, the expert's favourites."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = []
    if hasattr(made, "calibration_"):
        fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
        # A few clean inputs score so low that they would squeeze all others.
        scores = made.calibration_.double()
        ax.hist(scores.clamp_min(float(scores.quantile(0.1))).numpy(), bins=40)
        ax.axvline(report["threshold"], c="k", ls="--")
        ax.set(xlabel="suspicion", ylabel="clean examples")
        pictures.append((fig, "Scores of held-out clean examples (the lowest tenth at its edge), and the threshold."))
    if report.get("history"):
        fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
        ax.plot(*zip(*report["history"], strict=True), marker=".")
        ax.set(xlabel="step on wrong labels", ylabel="accuracy of the expert", ylim=(0, 1.02))
        pictures.append((fig, "How the backdoor expert forgot its task."))
    if report.get("expert"):
        fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
        names = list(report["expert"])[:40]
        ax.bar(range(len(names)), [report["expert"][name] for name in names])
        ax.axhline(1 / len(report["expert"]), c="grey", ls=":")
        ax.set_xticks(range(len(names)), names, rotation=60 if max(map(len, names)) > 3 else 0)
        ax.set(ylabel="mean confidence of the expert")
        pictures.append((fig, "What the expert believes of clean inputs; the line is no favourite."))
    return pictures


def _show(report: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"audit": str(output), **report}))
        return
    for sentence in [*report["sentences"], *([report["network"]["sentence"]] if "network" in report else [])]:
        typer.echo(sentence)
    for key, value in {"audit": str(output), "page": str(output / PAGE), **_figures(report)}.items():
        typer.echo(f"{key:>26}  {value}")


def _try(folder: Path, inputs: Path, allow: list[str], device: str, as_json: bool) -> None:
    """Score images with a filter."""
    from torchfolio.backdoor.audit import chance, p_values
    from torchfolio.bundle import load_bundle
    from torchfolio.engine.evaluate import resolve_device

    record = _record(folder)
    source = load_bundle(folder / NETWORK, allow=allow, device=resolve_device(device))
    factory: Any = catalog.offered(record["detector"], "input_detector")
    loaded = factory.load(folder, source.model)
    names, x = _images(inputs, source.manifest)
    labels, rejected = loaded.filtered(x)
    scores = loaded.score(x)
    p = p_values(loaded.calibration_, scores)
    classes = source.manifest.classes
    rows = [
        {"input": name, "label": classes[int(label)] if classes else int(label), "score": float(score),
         "p_value": float(value), "suspicious": bool(reject)}
        for name, label, score, value, reject in zip(names, labels, scores, p, rejected, strict=True)
    ]  # fmt: skip
    found = int(rejected.sum())
    odds = chance(loaded.calibration_, loaded.threshold_, len(rows), found)
    expected = len(rows) * record["false_positives"]["expected"]
    if as_json:
        typer.echo(json.dumps({"filter": str(folder), "inputs": rows, "suspicious": found, "expected_if_clean": expected,
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

    from torchfolio.data.images import SUFFIXES, decode

    if not inputs.exists():
        raise FileNotFoundError(f"there is no file or folder {inputs}")
    paths = sorted(p for p in inputs.rglob("*") if p.suffix.lower() in SUFFIXES) if inputs.is_dir() else [inputs]
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
