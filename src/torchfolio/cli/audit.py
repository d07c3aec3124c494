"""The command that looks for backdoors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio.cli._audit_record import RECORD, combined_report, refuse_strangers, show_report, write_audit
from torchfolio.cli._detectors import chosen_detectors, default_detector, needs_no_data
from torchfolio.cli._network import each_by_itself, normalized, open_network, predictor_of, say
from torchfolio.cli._options import MOST_SEED, Allow, AsJson, Device, ImageSize, ModelSet, alone, named
from torchfolio.cli._try_filter import SUSPICIOUS, try_filter
from torchfolio.cli._verdicts import Part, fit_filter, judge_network
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable

if TYPE_CHECKING:
    from torch import Tensor

    from torchfolio.backdoor.input_detector import InputDetector
    from torchfolio.backdoor.model_detector import ModelDetector
    from torchfolio.bundle import Bundle, Manifest


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
    if (data is None) == (inputs is None) and not (data is None and needs_no_data(detector)):
        raise TorchfolioError("expected either --data, clean examples to fit a detector, or --input, images to try")
    if inputs is not None:
        if folder is None or model is not None or weights is not None or reference:
            raise TorchfolioError(
                "--input takes the folder of a filter and nothing else: torchfolio audit filter/ --input x.png"
            )
        try_filter(folder, inputs, allowed, device, as_json)
        return
    if not 0 < alpha < 1:
        raise typer.BadParameter(f"expected a number between 0 and 1, got {alpha}", param_hint="--alpha")
    if budget is not None and not budget > 0:
        raise typer.BadParameter(f"expected a number above 0, got {budget}", param_hint="--budget")
    refuse_strangers(output)
    if folder is not None and (folder / RECORD).is_file():
        raise TorchfolioError(f"{folder} is a filter already; try it with --input")
    slugs = [default_detector()] if detector is None else [slug.strip() for slug in detector.split(",")]
    references = _references(reference or [], allowed, device)
    own = {
        "seed": seed,
        "device": _place(device),
        "alpha": alpha,
        "references": [predictor_of(bundle, allowed) for bundle in references],
    }
    if data is None:
        source, splits = _alone(folder, allowed), None
    else:
        source, splits = open_network(folder, model, weights, model_set, allowed, data, image_size, {"seed": seed},
                                      scored=False)  # fmt: skip
    own["words"] = _words(vocabulary, source.manifest)
    methods = chosen_detectors(slugs, setting or [], own)
    if model is not None and not normalize:
        source = replace(source, manifest=replace(source.manifest, mean=(), std=()))
    _check_alike(source, references, reference or [])
    name = str(folder) if folder is not None else f"{model} with {weights}"
    clean = None if splits is None else _examples(splits, source.manifest, size, seed)
    source.model.to(_place(device))
    audited = replace(source, model=predictor_of(source, allowed))
    classes = source.manifest.classes
    if not classes and clean is not None:
        classes = tuple(map(str, range(_outputs(audited, clean[0]))))
    detectors = {slug: (inputs_by, network_by) for slug, inputs_by, network_by in methods}
    doing = f"fitting to {name} on clean examples of {data}" if data else f"scanning {name} without data"

    def judged(slug: str) -> list[Part]:
        say(f"{slug}: {doing}")
        return _run(slug, *detectors[slug], audited, clean, classes, seed, budget)

    with alone(output, lambda: refuse_strangers(output)):
        results, failed = each_by_itself(detectors, judged, "judge this network")
        parts = [part for of in results.values() for part in of]
        report = {
            "network_name": name,
            "examples": 0 if clean is None else len(clean[0]),
            **combined_report(parts, classes, failed),
        }
        kept = next((by for slug, (by, _) in detectors.items() if by is not None and slug not in failed), None)
        write_audit(output, kept, source, report, parts)
    show_report(report, output, as_json)
    if any(part.report["suspicious"] for part in parts):
        raise typer.Exit(SUSPICIOUS)


def _run(
    slug: str,
    inputs_by: InputDetector | None,
    network_by: ModelDetector | None,
    source: Bundle,
    clean: tuple[Tensor, Tensor] | None,
    classes: Sequence[str],
    seed: int,
    budget: float | None,
) -> list[Part]:
    """What one method says of inputs and of the network, its warnings with the last."""
    parts: list[Part] = []
    notes: list[str] = []
    with _noting(notes):
        if inputs_by is not None and clean is not None:
            parts.append(Part(slug, "inputs", *fit_filter(inputs_by, source, clean, classes)))
        if network_by is not None:
            parts.append(Part(slug, "model", *judge_network(network_by, source, clean, classes, seed, budget)))
    parts[-1].notes.extend(notes)
    return parts


def _place(device: str) -> Any:
    from torchfolio.engine.devices import resolve_device

    return resolve_device(device)


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
        say(f"note: {note}")
