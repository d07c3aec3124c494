"""Images, judged by a filter that an audit has written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from torchfolio.cli import _detectors
from torchfolio.cli._audit_record import NETWORK, read_record
from torchfolio.cli._network import normalized, predictor_of
from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch import Tensor

    from torchfolio.bundle import Manifest

__all__ = ["try_filter"]

SUSPICIOUS = 1


def try_filter(folder: Path, inputs: Path, allow: list[str], device: str, as_json: bool) -> None:
    """Score images with a filter."""
    from torchfolio.backdoor.audit import chance, p_values
    from torchfolio.bundle import load_bundle
    from torchfolio.engine.devices import resolve_device
    from torchfolio.json_text import to_json

    record = read_record(folder)
    source = load_bundle(folder / NETWORK, allow=allow, device=resolve_device(device))
    factory = _detectors.offered(record["detector"], "input_detector")
    if factory is None:
        raise TorchfolioError(f"{record['detector']}, which made {folder}, is no filter of inputs")
    detector = factory.load(folder, predictor_of(source, allow))
    names, x = _images(inputs, source.manifest)
    judged = detector.judge(x)
    p = p_values(detector.calibration_, judged.scores)
    classes = source.manifest.classes
    rows = [
        {"input": name, "label": classes[int(label)] if classes else int(label), "score": float(score),
         "p_value": float(value), "suspicious": bool(reject)}
        for name, label, score, value, reject in zip(names, judged.labels, judged.scores, p, judged.rejected, strict=True)
    ]  # fmt: skip
    suspicious = int(judged.rejected.sum())
    odds = chance(detector.calibration_, detector.threshold_, len(rows), suspicious)
    expected = len(rows) * record["false_positives"]["expected"]
    if as_json:
        typer.echo(to_json({"filter": str(folder), "inputs": rows, "suspicious": suspicious, "expected_if_clean": expected,
                               "chance_if_clean": odds, "threshold": detector.threshold_}))  # fmt: skip
    else:
        for row in sorted(rows, key=lambda row: -row["score"]):
            if row["suspicious"] or len(rows) <= 20:
                mark = "suspicious" if row["suspicious"] else "passes"
                typer.echo(f"{mark:>10}  p {row['p_value']:.4f}  {row['label']}  {row['input']}")
        typer.echo(
            f"{suspicious} of {len(rows)} inputs are suspicious. Were all of them clean and like the examples of the audit, "
            f"{expected:.2g} would be expected, and {suspicious} or more with probability {odds:.2g}."
        )
    if suspicious:
        raise typer.Exit(SUSPICIOUS)


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
