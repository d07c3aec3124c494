"""The short form of an outcome that a project keeps: figures by seed, verdicts, what they were taken with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchfolio.catalog import Claim
from torchfolio.runs.outcome import Outcome
from torchfolio.runs.store import atomic

DIGITS = 6


def digest(slug: str, scale: str, settings: Any, claims: Iterable[Claim]) -> str:
    """A short digest of what a record depends on: settings of the scale and conditions of the claims.

    Args:
        slug: slug of the paper.
        scale: scale of the run.
        settings: a dataclass, or its fields as JSON holds them.
        claims: claims of the paper.
    """
    fields = dict(settings if isinstance(settings, Mapping) else asdict(settings))
    if fields.get("model", "") is None:  # a network of the user's own, where there is none
        del fields["model"]
    body = [slug, scale, fields, {claim.id: claim.holds for claim in claims}]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def record(outcome: Outcome, claims: Iterable[Claim], folder: Path) -> Path:
    """Write the short form of an outcome to `folder/SLUG.json`; ratios to peers that stand there stay.

    Raises:
        ValueError: if the run is not done.
    """
    if outcome.status != "done":
        raise ValueError(f"the run of {outcome.slug} is {outcome.status}: expected one that is done")
    head = {
        "slug": outcome.slug,
        "scale": outcome.scale,
        "seeds": outcome.seeds,
        "digest": digest(outcome.slug, outcome.scale, outcome.settings, claims),
        "command": outcome.command,
        "torch": outcome.environment.get("torch"),
        "seconds": outcome.seconds,
    }
    rows = [
        {
            "id": claim["id"],
            "holds": claim["holds"],
            "held_on": claim["held_on"],
            "values": {name: [_short(v) for v in value["seeds"]] for name, value in claim["values"].items()},
        }
        for claim in outcome.claims
    ]
    path = folder / f"{outcome.slug}.json"
    return _write(path, head, rows, read(path).get("peers", {}))


def record_peers(slug: str, peers: Mapping[str, Mapping[str, float]], folder: Path) -> Path:
    """Add ratios of times, a peer's over ours, by work and peer, to `folder/SLUG.json`."""
    path = folder / f"{slug}.json"
    outcome = read(path) or {"slug": slug, "claims": []}
    head = {key: value for key, value in outcome.items() if key not in ("claims", "peers")}
    short = {work: {name: _short(ratio) for name, ratio in ratios.items()} for work, ratios in peers.items()}
    return _write(path, head, outcome["claims"], short)


def read(path: Path) -> dict[str, Any]:
    """A record, or an empty table where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def claims_held(path: Path) -> str:
    """How many claims hold in a record, `"6 of 7"`; nothing where there is no record."""
    claims = read(path).get("claims", ())
    return f"{sum(claim['holds'] is True for claim in claims)} of {len(claims)}" if claims else ""


def _write(path: Path, head: Mapping[str, Any], rows: list[dict[str, Any]], peers: Mapping[str, Any]) -> Path:
    """A line for each claim, so that a change of one is seen as one."""
    top = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items())
    body = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    text = f'{{\n{top},\n  "claims": [\n{body}\n  ],\n  "peers": {json.dumps(peers, allow_nan=False)}\n}}\n'
    with atomic(path) as file:
        file.write(text.encode())
    return path


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
