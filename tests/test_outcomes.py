"""Recorded evidence is of today's experiments: the same settings, the same conditions, verdicts that follow."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import pytest

from torchfolio import catalog, peers
from torchfolio.data import load
from torchfolio.runs.expression import holds
from torchfolio.runs.record import digest
from torchfolio.runs.settings import described

OUTCOMES = sorted((Path(__file__).parent.parent / "docs" / "outcomes").glob("*.json"))
PEERS = sorted(path for path in Path(peers.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", OUTCOMES, ids=lambda path: path.stem)
def test_a_record_is_of_today(path):
    recorded = json.loads(path.read_text())
    paper = catalog.paper(path.stem)
    experiment = importlib.import_module(f"torchfolio.experiments.{path.stem}")
    now = digest(path.stem, recorded["scale"], experiment.SCALES[recorded["scale"]], paper.claims)
    assert recorded["digest"] == now, (
        f"settings or conditions changed: torchfolio run {path.stem} --record docs/outcomes"
    )
    assert recorded["scale"] in ("quick", "full")
    assert len(recorded["seeds"]) >= 3
    assert [claim["id"] for claim in recorded["claims"]] == [claim.id for claim in paper.claims]


@pytest.mark.parametrize("path", OUTCOMES, ids=lambda path: path.stem)
def test_verdicts_follow_from_the_figures(path):
    recorded = json.loads(path.read_text())
    paper = catalog.paper(path.stem)
    for claim in recorded["claims"]:
        condition = paper.claim(claim["id"])
        if not claim["values"]:
            assert claim["holds"] is None
            continue
        # A figure that is not finite is kept as null, and no condition holds of it.
        by_seed = {name: [float("nan") if v is None else v for v in seeds] for name, seeds in claim["values"].items()}
        count = len(recorded["seeds"])
        each = [holds(condition.holds, {name: seeds[k] for name, seeds in by_seed.items()}) for k in range(count)]
        mean = holds(condition.holds, {name: sum(seeds) / count for name, seeds in by_seed.items()})
        assert claim["holds"] == (all(each) if condition.every_seed else mean), claim["id"]


@pytest.mark.parametrize("slug", [path.stem for path in OUTCOMES])
def test_every_setting_has_its_words(slug):
    """As `torchfolio show SLUG --settings` and the pages print them."""
    for name, (_, words) in described(
        importlib.import_module(f"torchfolio.experiments.{slug}").SCALES["quick"]
    ).items():
        assert words, f"{slug}: give `{name}` its words by torchfolio.runs.setting"
        assert not words.endswith(".")


def test_peers_belong_to_papers():
    for path in PEERS:
        assert catalog.paper(path.stem).is_in
        assert callable(importlib.import_module(f"torchfolio.peers.{path.stem}").peers)


def test_the_page_names_what_takes_long():
    """Seconds are those of the arms, so that a run that was resumed counts whole."""
    page = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text()
    (sentence,) = [part for part in page.split("\n\n") if "took at most five minutes" in part]
    records = [json.loads(path.read_text()) for path in OUTCOMES]
    long = {r["slug"] for r in records if r["scale"] == "quick" and r["seconds"] > 300 * len(r["seeds"])}
    assert {slug for slug in long if f"`{slug}`" not in sentence} == set()
    (shown,) = [r for r in records if r["slug"] == "gbnn"]
    assert shown["seconds"] < 60 * len(shown["seeds"])


def test_every_claim_of_a_method_that_is_in_has_a_condition():
    for paper in catalog.papers().values():
        if paper.is_in:
            assert all(claim.holds for claim in paper.claims), paper.slug
            assert paper.offers.get("names"), paper.slug


def test_what_papers_offer_is_there():
    for paper in catalog.papers().values():
        if paper.is_in:
            family = importlib.import_module(f"torchfolio.{paper.family}")
            for kind, names in paper.offers.items():
                for name in names:
                    value = catalog.load_name(name if ":" in name else f"{paper.module}:{name}")
                    assert callable(value), (paper.slug, kind, name)
            assert set(paper.offers["names"]) <= set(family.__all__)
            assert all(getattr(family, name) is not None for name in paper.offers["names"])


def test_splits_are_those_that_records_were_taken_on():
    """No digest of settings tells when a set is split or ordered in another way: every record on data is stale then."""
    data = load("digits", seed=0)
    labels = b"".join(part.tensors[1].numpy().tobytes() for part in (data.train, data.val, data.test))
    assert hashlib.sha256(labels).hexdigest()[:16] == "891da24937ea52a9", (
        "take the records of all papers again, on the same seeds"
    )
