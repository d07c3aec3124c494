"""The report: one file that holds everything, is safe to open, and works in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import random
import re
import shutil
import time

import matplotlib
import matplotlib.pyplot as plt
import pytest

from torchfolio.errors import TorchfolioError
from torchfolio.report import write_report
from torchfolio.report.page import collect, render
from torchfolio.report.svg import dot_plot, picture
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
    (shown,) = pictures(text)
    assert "clip-path" in shown


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


def pictures(text):
    """The pictures of a page, decoded."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="[^"]*">', text)
    return [base64.b64decode(data).decode() for data in found]


EVIL_PARTS = [
    "<script>alert('evil')</script>", "<Script>alert('evil')</Script>", "<SCRIPT href='http://evil.test/a'/>",
    "<h:script xmlns:h='http://www.w3.org/1999/xhtml'>alert('evil')</h:script>",
    "<h:SCRIPT xmlns:h='http://www.w3.org/1999/xhtml' src='http://evil.test/b'/>",
    "<foreignObject><iframe xmlns='http://www.w3.org/1999/xhtml' srcdoc='&lt;script&gt;alert(1)&lt;/script&gt;'/></foreignObject>",
    "<foreignobject><body xmlns='http://www.w3.org/1999/xhtml' onload='alert(\"evil\")'/></foreignobject>",
    "<title><iframe xmlns='http://www.w3.org/1999/xhtml' srcdoc='&lt;script&gt;alert(1)&lt;/script&gt;'/></title>",
    "<title><iframe srcdoc='&lt;script&gt;alert(1)&lt;/script&gt;'/></title>",
    "<style>@import url('http://evil.test/c.css'); *{background:url(http://evil.test/d)}</style>",
    "<style>*{background:\\75rl(http://evil.test/e)}</style>", "<style>*{background:image-set('http://evil.test/f' 1x)}</style>",
    "<a href='javascript:alert(1)'><text>evil link</text></a>", "<a xlink:href='http://evil.test/g'><rect/></a>",
    "<rect onload='alert(\"evil\")' OnClick='alert(1)' onmouseover='alert(1)' width='9' height='9'/>",
    "<rect style='fill:url(http://evil.test/h)' fill='url(&quot;http://evil.test/i&quot;)'/>",
    "<image href='http://evil.test/j.png'/>", "<image xlink:href='file:///etc/passwd'/>",
    "<image href='data:image/svg+xml,&lt;svg onload=alert(1)&gt;'/>", "<use href='http://evil.test/k.svg#a'/>",
    "<use xlink:href='data:text/html,&lt;script&gt;alert(1)&lt;/script&gt;'/>",
    "<a id='m'><animate attributeName='href' values='javascript:alert(1)'/><set attributeName='href' to='http://evil.test'/></a>",
    "<ANIMATE attributeName='xlink:href' to='javascript:alert(1)'/>", "<feImage href='http://evil.test/l'/>",
    "<filter><feImage xlink:href='http://evil.test/m'/></filter>", "<object data='http://evil.test/n'/>",
    "<embed src='http://evil.test/o'/>", "<h:link xmlns:h='http://www.w3.org/1999/xhtml' rel='stylesheet' href='http://evil.test/p'/>",
    "<h:meta xmlns:h='http://www.w3.org/1999/xhtml' http-equiv='refresh' content='0;url=http://evil.test/q'/>",
    "<h:img xmlns:h='http://www.w3.org/1999/xhtml' src='x' onerror='alert(1)'/>", "<text xml:base='http://evil.test/'>r</text>",
    "<metadata><script>alert(1)</script></metadata>", "<handler xmlns:ev='http://www.w3.org/2001/xml-events' ev:event='load'>alert(1)</handler>",
    "<style>a<title/>@import 'http://evil.test/v';</style>", "<rect style='fill:url(#a, url(http://evil.test/w))'/>",
    "<rect style='fill:cross-fade(url(#a), \"http://evil.test/x\")'/>", "<rect fill='paint(evil)'/>",
    "<cursor xlink:href='http://evil.test/s'/>", "<font-face-uri xlink:href='http://evil.test/t'/>",
]  # fmt: skip


def evil_svg(part):
    return (
        "<?xml version='1.0'?><?xml-stylesheet href='http://evil.test/u.css'?><svg xmlns='http://www.w3.org/2000/svg' "
        f"xmlns:xlink='http://www.w3.org/1999/xlink' onload='alert(1)' viewBox='0 0 9 9'>{part}<path d='M0 0H9'/></svg>"
    )


@pytest.mark.parametrize("part", EVIL_PARTS)
def test_pictures_of_strangers_are_made_safe(part):
    (shown,) = pictures(picture(evil_svg(part), 'a "picture"'))
    for bad in ("alert", "evil", "script", "iframe", "onload", "foreign", "file:", "srcdoc", "nimate"):
        assert bad not in shown.lower(), bad
    assert 'd="M0 0H9"' in shown


def test_what_a_picture_needs_is_kept():
    good = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"><style>*{stroke-linecap:butt}</style>'
        '<g id="image3"><rect id="r" fill="url(#g)" style="fill:url(#g);clip-path: url(\'#c\')"/><use xlink:href="#r"/></g>'
        '<image xlink:href="data:image/png;base64,AAAA"/></svg>'
    )
    (shown,) = pictures(picture(good, "x"))
    for part in (
        'id="image3"',
        'fill="url(#g)"',
        "clip-path: url('#c')",
        "stroke-linecap",
        '"#r"',
        "image/png;base64,AAAA",
    ):
        assert part in shown, part


def test_copies_of_copies_end():
    """Twelve lines of it would have a browser draw for ever."""
    tenfold = "".join(f'<g id="a{k + 1}">' + f'<use href="#a{k}"/>' * 10 + "</g>" for k in range(12))
    start = time.perf_counter()
    for inside, message in ((f'<g id="a0"/>{tenfold}', "draws more than 1,000,000 elements"),
                            ('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>', "drawn within itself"),
                            ('<pattern id="p"><rect fill="url(#p)"/></pattern>', "drawn within itself")):  # fmt: skip
        assert message in picture(f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>', "x")
    glyphs = '<defs><path id="g" d="M0 0"/></defs>' + '<use href="#g" x="1"/>' * 20_000
    assert "<img" in picture(f'<svg xmlns="http://www.w3.org/2000/svg">{glyphs}</svg>', "x")
    assert time.perf_counter() - start < 5


def test_what_is_no_picture_says_so():
    assert "cannot be read" in picture("<svg", "x")
    assert "no SVG" in picture("<a/>", "x")
    assert "no SVG" in picture("<svg/>", "x")
    assert "entities" in picture('<!DOCTYPE s [<!Entity a "b">]><svg xmlns="http://www.w3.org/2000/svg"/>', "x")
    assert "characters" in picture(" " * 2**25, "x")
    deep = "<g>" * 100_000 + "</g>" * 100_000
    assert "<p>" in picture(f'<svg xmlns="http://www.w3.org/2000/svg">{deep}</svg>', "x")


def test_figures_from_outside_the_run_are_not_shown(tmp_path):
    (tmp_path / "secret.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><text>secret</text></svg>')
    figures = [{"name": "x", "caption": "", "svg": "../../secret.svg", "png": ""}]
    run_folder(tmp_path, figures=figures)
    assert "secret" not in page(tmp_path)


def test_the_page_may_do_what_is_its_own_alone(tmp_path):
    run_folder(tmp_path)
    text = page(tmp_path)
    (rules,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert "unsafe" not in rules
    assert "default-src &#39;none&#39;" in rules
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in html.unescape(rules)
    assert not re.search(r"\sstyle=", text), "the policy would stop it"


def places(body, path=()):
    """Every place in a JSON document."""
    yield path
    for key, value in body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ():
        yield from places(value, (*path, key))


WRONG = [
    None, True, -1, 2.5, 10**400, float("nan"), float("-inf"), "", "<img src=x onerror=alert(1)>", "\ud800", "{{ 7*7 }}", [], {},
    [None], {"a": None}, [[[]]], "clear", "../..", "\x00",
]  # fmt: skip


def test_one_bad_field_costs_its_own_card_only(tmp_path):
    # Every place of an outcome takes wrong values; its folder stands beside a good one.
    rng, count, refused = random.Random(0), 0, 0
    run_folder(tmp_path, slug="man", command="the good one")
    folder = tmp_path / "bad" / "run"
    folder.mkdir(parents=True)
    for path in list(places(outcome()))[1:]:
        for value in rng.sample(WRONG, 7):
            body = outcome(figures=[{"name": "x", "caption": "", "svg": "no.svg", "png": ""}])
            inner = body
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (folder / "outcome.json").write_text(json.dumps(body))
            text = render(collect([folder, tmp_path / "man" / "a"]))
            assert "the good one" in text, (path, value)
            assert "<img src=x" not in text, (path, value)
            count, refused = count + 1, refused + ("This run cannot be read" in text)
    assert count > 400
    assert refused > 200


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"slug": ' * 5000, "1" * 5000, "\x00", '{"format": 1}', "NaN"],
    ids=lambda text: ascii(text[:12]),
)
def test_one_bad_file_costs_its_own_card_only(tmp_path, content):
    run_folder(tmp_path, slug="man", command="the good one")
    folder = run_folder(tmp_path, slug="sltt")
    (folder / "outcome.json").write_text(content)
    text = page(tmp_path)
    assert "the good one" in text
    assert "This run cannot be read" in text


def test_missing_and_strange_files_cost_their_own_card_only(tmp_path):
    run_folder(tmp_path, slug="man", command="the good one")
    names = ["figures", "none.svg", "\x00", "a" * 5000, "/etc/passwd", "loop.svg", "bytes.svg", "outcome.json"]
    figures = [{"name": n[:9], "caption": "", "svg": n, "png": ""} for n in names]
    folder = run_folder(tmp_path, slug="sltt", figures=figures)
    (folder / "loop.svg").symlink_to(folder / "loop.svg")
    (folder / "bytes.svg").write_bytes(b"\xff\x00")
    (tmp_path / "gbnn" / "a" / "outcome.json").mkdir(parents=True)
    (tmp_path / "biper" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "biper" / "a" / "outcome.json")
    text = page(tmp_path)
    assert "the good one" in text
    assert text.count("This run cannot be read") == 2
    assert "This picture cannot be read" in text
    assert "root:x:0" not in text


def test_names_of_strangers_do_not_take_the_place_of_ours(tmp_path):
    run_folder(tmp_path, slug="clear")
    run_folder(tmp_path, slug="search")
    text = page(tmp_path)
    for name in ("clear", "search", "none"):
        assert text.count(f'id="{name}"') == 1


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


def requested(browser):
    """What was asked for that the page does not hold itself."""
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    return {u for u in urls if not u.startswith(("file:", "data:", "chrome:"))}


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
    assert requested(browser) == set()


@pytest.mark.browser
def test_hostile_runs_in_a_browser(browser, tmp_path):
    from selenium.common.exceptions import NoAlertPresentException

    # All of it in every text field, and a picture of each kind; honest runs stand beside.
    text = "</script><script>alert(1)</script>\"'><img src=http://evil.test/x onerror=alert(1)><iframe srcdoc='<script>alert(1)</script>'></iframe>{{7*7}}"
    figures = [{"name": f"{i}{text}", "caption": text, "svg": f"f{i}.svg", "png": text} for i in range(len(EVIL_PARTS))]
    error = dict.fromkeys(("type", "message", "traceback"), text)
    value = {"mean": 1.0, "sem": 2.0, "seeds": [1.0, 2.0]}
    claim = {**outcome()["claims"][0], **dict.fromkeys(("id", "sentence", "paper", "what", "expression", "note"), text)}
    claim["values"] = {text: value, "b": {**value, "mean": 3.0}}
    changes = {
        "command": text, "started": text, "scale": text, "settings": {text: text}, "environment": {text: text}, "claims": [claim],
        "arms": {text: {text: value}}, "figures": figures,
    }  # fmt: skip
    for slug, more in (("auglocal", {}), ("evil", {"status": "failed", "error": error})):
        folder = run_folder(tmp_path / "runs", slug=slug, figure=False, **changes, **more)
        for i, part in enumerate(EVIL_PARTS):
            (folder / f"f{i}.svg").write_text(evil_svg(part))
    broken = run_folder(tmp_path / "runs", name=text.replace("/", "_")[:200], slug="sltt")
    (broken / "outcome.json").write_text(json.dumps(text))
    run_folder(tmp_path / "runs", slug="man")
    path = write_report(tmp_path / "runs", tmp_path / "report.html")
    browser.get(path.resolve().as_uri())
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert (
        browser.execute_script("return [...document.querySelectorAll('script, style, iframe, base, object')].length")
        == 2
    )
    assert browser.execute_script("return [...document.images].length") == 2 * len(EVIL_PARTS) + 1
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert len(browser.find_elements("css selector", ".card")) == 4
    # A click on everything, as a reader would.
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    for shown in browser.find_elements("css selector", "figure, .claim, summary")[:20]:
        browser.execute_script("arguments[0].click()", shown)
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    # Each picture opened alone, which is the worst that a reader can do with it.
    for shown in {image.get_attribute("src") for image in browser.find_elements("tag name", "img")}:
        svg = tmp_path / "alone.svg"
        svg.write_bytes(base64.b64decode(shown.partition(",")[2]))
        browser.get(svg.as_uri())
        with pytest.raises(NoAlertPresentException):
            browser.switch_to.alert.accept()
    assert requested(browser) == set()


@pytest.mark.browser
def test_the_browser_test_would_see_a_script_and_a_request(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<script>alert(1)</script><img src='http://evil.test/x'>")
    browser.get(path.as_uri())
    browser.switch_to.alert.accept()
    assert any("evil.test" in url for url in requested(browser))


@pytest.mark.browser
def test_pictures_look_as_they_are(browser, tmp_path):
    # Styles within a picture count, whatever the page's policy says of its own.
    figures = [{"name": "red", "caption": "", "svg": "red.svg", "png": ""}]
    folder = run_folder(tmp_path / "runs", figure=False, figures=figures)
    (folder / "red.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 4"><style>rect{fill:#ff0000}</style><rect width="4" height="4"/>'
        '<rect x="4" width="4" height="4" style="fill: #0000ff"/></svg>'
    )
    browser.get(write_report(tmp_path / "runs", tmp_path / "report.html").resolve().as_uri())
    colours = browser.execute_script(
        "const c = document.createElement('canvas').getContext('2d'); c.drawImage(document.images[0], 0, 0, 80, 40);"
        "return [20, 60].map(x => [...c.getImageData(x, 20, 1, 1).data]);"
    )
    assert colours == [[255, 0, 0, 255], [0, 0, 255, 255]]
