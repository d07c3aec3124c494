"""The record of an audit and its page: what all detectors say, in one file, on one page and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from torchfolio.checks import writable
from torchfolio.cli._verdicts import Part
from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torchfolio.backdoor.input_detector import InputDetector
    from torchfolio.bundle import Bundle

__all__ = ["combined_report", "read_record", "refuse_strangers", "show_report", "write_audit"]

FORMAT = 1
RECORD, PAGE, NETWORK = "audit.json", "index.html", "net"


def combined_report(parts: Sequence[Part], classes: Sequence[str], failed: Mapping[str, str]) -> dict[str, Any]:
    """The record of an audit: the filter's figures first where there is one, then the verdicts on the network.

    Args:
        parts: parts of the methods that came to an end, at least one.
        classes: names of the labels.
        failed: reasons of those that did not, by slug.
    """
    first = min(parts, key=lambda part: part.kind != "inputs")
    verdicts = [part for part in parts if part.kind == "model" and part is not first]
    report = {"detector": first.slug, "notes": [note for part in parts for note in part.notes], **first.report}
    report |= {"failed": dict(failed)} if failed else {}
    if len({part.slug for part in parts}) == 1:
        return report | ({"network": verdicts[0].report} if verdicts else {})
    judged = {part.slug: part.report for part in parts if part.kind == "model"}
    return report | {"networks": judged, "together": _together(judged, classes)}


def _together(judged: dict[str, dict[str, Any]], classes: Sequence[str]) -> str:
    """One sentence on what several methods say of a network."""
    if not judged:
        return "No method judged the network itself."
    suspicious = [slug for slug, report in judged.items() if report["suspicious"]]
    if not suspicious:
        return f"No method finds a backdoor in the network ({', '.join(judged)}); that is no proof that it has none."
    sentence = (
        f"{len(suspicious)} of {len(judged)} methods that judge networks find a backdoor: {', '.join(suspicious)}."
    )
    targets = [{target for _, target in judged[slug]["pairs"]} for slug in suspicious]
    common = set.intersection(*targets)
    if len(suspicious) > 1:
        named = ", ".join(str(classes[k]) for k in sorted(common))
        sentence += f" They agree on the target {named}." if common else " They do not agree on a target."
    return sentence


def refuse_strangers(output: Path) -> None:
    """Refuse a folder that holds something else than an audit, or where none can be written.

    Raises:
        TorchfolioError: in the first case.
        OSError: in the second.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not (output / RECORD).is_file():
        raise TorchfolioError(f"{output} exists and is no audit; name another folder with -o")
    writable(output)


def write_audit(
    output: Path, detector: InputDetector | None, source: Bundle, report: dict[str, Any], parts: list[Part]
) -> None:
    """The filter with the network that it is for, the page, and last the record that makes it readable."""
    from torchfolio.bundle import save_bundle
    from torchfolio.report.sheet import write_sheet
    from torchfolio.runs.store import write_json

    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD).unlink(missing_ok=True)
    if detector is not None:
        save_bundle(source.model, output / NETWORK, source.manifest)
        detector.save(output)
    write_sheet(output / PAGE, f"audit of {report['network_name']}", _cards(report, parts))
    write_json(output / RECORD, {"format": FORMAT, "kind": "model" if detector is None else "inputs", **report})


def _cards(report: dict[str, Any], parts: list[Part]) -> list[Any]:
    """One card for one method; for several, one with what they say together and one each."""
    from torchfolio.report.sheet import Picture, Sheet, Table

    def card(eyebrow: str, of: Sequence[Part], sentences: Sequence[str], rows: dict[str, str]) -> Sheet:
        badge = ("suspicious", "fails") if any(p.report["suspicious"] for p in of) else ("nothing found", "unmeasured")
        headline, *rest = sentences
        notes = [note for p in of for note in p.notes]
        pictures = [Picture(*pair) for p in of for pair in p.pictures]
        return Sheet(headline, eyebrow, badge, rest, notes, [Table(("figure", "value"), tuple(rows.items()))], pictures)

    reasons = [f"{slug} cannot do it: {reason}" for slug, reason in report.get("failed", {}).items()]
    missing = [Sheet("What could not be told", sentences=reasons)] if reasons else []
    if "together" not in report:
        ordered = sorted(parts, key=lambda part: not (part.kind == "model" and part.report["suspicious"]))
        sentences = [text for part in ordered for text in part.report["sentences"]]
        return [card(report["detector"], parts, sentences, _figures(report)), *missing]
    badge = ("suspicious", "fails") if any(p.report["suspicious"] for p in parts) else ("nothing found", "unmeasured")
    first = Sheet(report["together"], "all methods", badge)
    every = {"examples": report["examples"]}
    cards = (card(p.slug, [p], p.report["sentences"], _figures({**p.report, **every})) for p in parts)
    return [first, *cards, *missing]


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


def show_report(report: dict[str, Any], output: Path, as_json: bool) -> None:
    """Print what an audit says, and where it is."""
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


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a filter; raises TorchfolioError on anything else."""
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
