"""The tour: five things that are measured where it runs, on one page."""

from __future__ import annotations

import json
import re

from typer.testing import CliRunner

from torchfolio import catalog
from torchfolio.cli import app
from torchfolio.report import demo


def test_the_page_shows_five_things_and_the_recorded_evidence(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 2)
    done = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "tour"), "--json"])
    assert done.exit_code == 0, done.output
    page = json.loads(done.stdout)["page"]
    text = (tmp_path / "tour" / "demo.html").read_text(encoding="utf-8")
    assert page.endswith("demo.html")
    assert text.count('class="tile"') == 5
    assert text.count("data:image/svg+xml;base64,") == 10  # each once as a tile and once in its card
    assert "Content-Security-Policy" in text
    assert not re.search(r"(src|href)=\"http", text)
    assert "suspicious" in text
    recorded = dict(demo._records())
    assert len(recorded) >= 40
    assert all(slug in text for slug in recorded)
    assert "does not hold" in text
    failed = [c["id"] for record in recorded.values() for c in record["claims"] if c["holds"] is False]
    assert f"{len(failed)} do not" in text
    assert set(recorded) <= set(catalog.papers())
