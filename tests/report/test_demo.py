"""The tour: five things that are measured where it runs, on one page, with code and commands that run."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial

import pytest
from typer.testing import CliRunner

from torchfolio import catalog, models, runs
from torchfolio.cli import app
from torchfolio.report import demo
from torchfolio.report.sheet import Table, write_sheet


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The cards and the page, after short trainings."""
    folder, cards = tmp_path_factory.mktemp("tour"), []

    def kept(path, title, written):
        cards.extend(written)
        return write_sheet(path, title, written)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "EPOCHS", 2)
        patch.setattr(demo, "write_sheet", kept)
        done = CliRunner().invoke(app, ["demo", "-o", str(folder / "demo"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["page"].endswith("demo.html")
    return cards, (folder / "demo" / "demo.html").read_text(encoding="utf-8")


def test_the_page_shows_five_things_and_the_recorded_evidence(tour):
    cards, text = tour
    assert text.count('class="tile"') == len(cards) == 6
    assert all(card.glance and card.code and len(card.code.lines.splitlines()) <= 3 for card in cards)
    assert "Content-Security-Policy" in text
    assert not re.search(r"(src|href)=\"http", text)
    assert " style=" not in text, "its policy forbids styles of elements"
    assert cards[2].glance.figure == "suspicious"
    assert "twin not suspicious" in cards[2].glance.words
    recorded = dict(demo._records())
    assert len(recorded) >= 40
    assert all(f"<summary>{slug}: " in text for slug in recorded)
    verdicts = [claim["holds"] for record in recorded.values() for claim in record["claims"]]
    assert f"{verdicts.count(True)} hold, {verdicts.count(False)} do not" in text
    assert text.count('class="fails"') == verdicts.count(False) > 0
    assert set(recorded) <= set(catalog.papers())


def test_what_stands_on_a_page_is_escaped(tmp_path):
    page = write_sheet(tmp_path / "p.html", "<b>", [demo.Sheet(
        "<i>", tables=[Table(("a",), (("<u>",),), fold="<s>")], code=demo.Code("<q>", "<q>", "<q>"),
        glance=demo.Glance("<q>", "<q>", demo.Picture(demo.Bars({"<q>": float("nan"), "b": -1}, "<q>"), "<q>")),
    )])  # fmt: skip
    assert not re.search(
        "<[busiq]>", page.read_text(encoding="utf-8").partition("<h1>torchfolio")[2].replace("<b>&lt;q", "")
    )


def test_the_lines_of_python_run(tour, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "run_experiment", partial(_smoke, runs.run_experiment))
    held = {"a": models.MLP(64, 10, hidden=(8, 8)), "b": models.MLP(64, 10, hidden=(8, 8)), "digits": None}
    cards, _ = tour
    for card in cards:
        if "SmoothInv" in card.code.lines:
            held["net"] = demo.convolutions()
        exec(f"{card.code.setup}\n{card.code.lines}".replace("epochs=12", "epochs=1"), held)
    assert held["verdict"].score >= 0
    assert (tmp_path / "net.svg").is_file()
    assert held["outcome"].slug == "auglocal"


def _smoke(run_experiment, slug, seeds):
    return run_experiment(slug, scale="smoke")


@pytest.mark.slow
def test_the_commands_run(tour, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cards, _ = tour
    train, *others = [shlex.split(card.code.command) for card in cards]
    other = [*train[:-1], "other/", "--seed", "1"]
    for command in (train, other, *others):
        more = {
            "train": ["--epochs", "2"],
            "run": ["--scale", "smoke"],
            "compress": ["--epochs", "2"],
            "audit": ["--size", "60", "--set", "steps=4"],
        }.get(command[1], [])
        done = CliRunner().invoke(app, [*command[1:], *more])
        assert done.exit_code == 0, f"{command}: {done.output}"
