"""The report: one file that holds everything, is safe to open, and works in a real browser."""

from __future__ import annotations

import json
import re
import shutil

import matplotlib
import matplotlib.pyplot as plt
import pytest

from torchfolio.errors import TorchfolioError
from torchfolio.report import write_report
from torchfolio.report.svg import dot_plot, inline_svg
from torchfolio.runs.run import save_figure

matplotlib.use("agg")


def outcome(slug="auglocal", scale="quick", holds=True, **changes):
    value = {"mean": 50.3, "sem": 0.4, "seeds": [49.9, 50.7]}
    claim = {
        "id": "accuracy", "sentence": "It is as good as <b>backprop</b>.", "paper": "93.96 %", "what": "Test accuracy.",
        "expression": "ours >= base - 2", "values": {"ours": value, "base": {**value, "mean": 51.0}}, "holds": holds,
        "held_on": 2, "of": 2, "note": None,
    }  # fmt: skip
    skipped = {
        **claim,
        "id": "other",
        "values": {},
        "holds": None,
        "held_on": 0,
        "of": 0,
        "expression": None,
        "note": "x",
    }
    return {
        "format": 1, "slug": slug, "scale": scale, "status": "done", "error": None, "seeds": [0, 1], "settings": {"epochs": 3},
        "command": f"torchfolio run {slug} --seeds 2", "started": "2026-01-02T03:04:05+00:00", "seconds": 12.5,
        "environment": {"torch": "2"}, "claims": [claim, skipped], "arms": {"ours": {"accuracy": value}},
        "figures": [{"name": "curve", "caption": "a curve", "svg": "figures/curve.svg", "png": "figures/curve.png"}],
    } | changes  # fmt: skip


def run_folder(root, name="a", figure=True, **arguments):
    made = outcome(**arguments)
    folder = root / made["slug"] / name
    folder.mkdir(parents=True)
    if figure:
        fig, ax = plt.subplots()
        ax.plot([1, 2], [2, 1])
        save_figure(folder / "figures", "curve", fig)
    (folder / "outcome.json").write_text(json.dumps(made))
    return folder


def page(root):
    return write_report(root, root / "out" / "report.html").read_text()


def test_claims_figures_and_commands_are_there(tmp_path):
    run_folder(tmp_path)
    text = page(tmp_path)
    for part in (
        "50.3",
        "± s.e.",
        "ours ≥ base − 2",
        "2 of 2 seeds",
        "not measured",
        "torchfolio run auglocal --seeds 2",
    ):
        assert part in text, part
    assert "Augmented Auxiliary Networks" in text
    assert "<svg" in text
    assert "clip-path" in text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    run_folder(tmp_path)
    text = page(tmp_path)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:)", text)
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)


def test_text_of_strangers_is_escaped(tmp_path):
    run_folder(tmp_path, command="<script>alert(1)</script>", slug="evil", figure=False, figures=[])
    text = page(tmp_path)
    assert "<script>alert" not in text
    assert "&lt;b&gt;backprop" in text


def test_pictures_of_strangers_are_made_safe():
    evil = (
        '<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(2)</script><style>body{display:none}</style>'
        '<a href="javascript:alert(3)"><rect id="r" fill="url(#g)" style="fill:url(http://x/y)"/></a>'
        '<image href="http://x/y.png"/><use href="#r"/></svg>'
    )
    safe = inline_svg(evil, "p", "a picture")
    for bad in ("alert", "http://x", "display:none", "onload"):
        assert bad not in safe
    assert 'id="p-r"' in safe
    assert 'href="#p-r"' in safe
    assert "url(#p-g)" in safe
    assert "cannot be read" in inline_svg("<svg", "p", "x")
    assert "no SVG" in inline_svg("<a/>", "p", "x")


def test_figures_from_outside_the_run_are_not_shown(tmp_path):
    (tmp_path / "secret.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><text>secret</text></svg>')
    figures = [{"name": "x", "caption": "", "svg": "../../secret.svg", "png": ""}]
    run_folder(tmp_path, figures=figures)
    assert "secret" not in page(tmp_path)


def test_ids_of_pictures_do_not_meet(tmp_path):
    run_folder(tmp_path, slug="auglocal")
    run_folder(tmp_path, slug="man")
    ids = re.findall(r'\bid="([^"]+)"', page(tmp_path))
    assert len(ids) == len(set(ids))


def test_fullest_and_newest_run_is_shown(tmp_path):
    run_folder(tmp_path, "a", scale="full", started="2026-01-01", command="the full one")
    run_folder(tmp_path, "b", scale="quick", started="2026-01-03", command="a newer quick one")
    text = page(tmp_path)
    assert "the full one" in text
    assert "a newer quick one" not in text
    assert "Other runs (1)" in text


def test_failures_and_broken_runs_are_shown(tmp_path):
    error = {"type": "ValueError", "message": "it broke", "traceback": "Traceback: here"}
    run_folder(tmp_path, status="failed", error=error, claims=[], arms={}, figures=[])
    broken = tmp_path / "man" / "x"
    broken.mkdir(parents=True)
    (broken / "outcome.json").write_text("{")
    text = page(tmp_path)
    assert "ValueError: it broke" in text
    assert "Traceback: here" in text
    assert "This run cannot be read" in text


def test_smoke_is_no_evidence(tmp_path):
    run_folder(tmp_path, scale="smoke")
    assert "is no evidence" in page(tmp_path)


def test_no_runs(tmp_path):
    with pytest.raises(TorchfolioError, match="no runs"):
        write_report(tmp_path, tmp_path / "r.html")
    with pytest.raises(TorchfolioError, match="does not exist"):
        write_report(tmp_path / "nowhere", tmp_path / "r.html")


def test_dot_plot_draws_every_seed():
    values = {"a": {"mean": 1.5, "seeds": [1, 2]}, "b": {"mean": 3.5, "seeds": [3, 4]}}
    assert dot_plot(values, None).count("<circle") == 4
    assert dot_plot({"a": values["a"]}, None) == ""
    assert dot_plot(values | {"c": {"mean": 1e6, "seeds": [1e6]}}, None) == ""


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("there is no Chromium with its driver")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = selenium.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.mark.browser
def test_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    run_folder(tmp_path / "runs", slug="auglocal")
    run_folder(tmp_path / "runs", slug="man", holds=False)
    path = write_report(tmp_path / "runs", tmp_path / "report.html")
    browser.set_window_size(1200, 1000)
    browser.get(path.resolve().as_uri())

    def shown():
        return [c.get_attribute("id") for c in browser.find_elements(By.CSS_SELECTOR, ".card") if c.is_displayed()]

    assert shown() == ["auglocal", "man"]
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    search = browser.switch_to.active_element
    assert search.get_attribute("id") == "search"
    search.send_keys("momentum")
    assert shown() == ["man"]
    assert browser.find_element(By.ID, "found").text == "1 of 2"
    search.send_keys("nothing like it")
    assert shown() == []
    browser.find_element(By.ID, "clear").click()
    assert len(shown()) == 2
    Select(browser.find_element(By.ID, "status")).select_by_value("fails")
    assert shown() == ["man"]
    Select(browser.find_element(By.ID, "status")).select_by_value("")
    Select(browser.find_element(By.ID, "family")).select_by_visible_text("local")
    assert len(shown()) == 2
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.find_element(By.ID, "theme").send_keys(Keys.ENTER)
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    assert browser.save_screenshot(str(tmp_path / "report.png"))
    browser.set_window_size(390, 800)
    wide = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, "a phone scrolls sideways"
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    urls = [
        json.loads(e["message"])["message"]["params"]
        for e in browser.get_log("performance")
        if "requestWillBeSent" in e["message"]
    ]
    asked = {u["request"]["url"] for u in urls if "request" in u}
    assert all(u.startswith(("file:", "data:", "chrome:")) for u in asked), asked
