"""Exit codes: 2 for whatever a user may get wrong, before any work; 3 for what nobody foresaw; never a traceback."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import typer
from typer.testing import CliRunner

from torchfolio import checks, cli
from torchfolio.bundle import Manifest, load_bundle, save_bundle
from torchfolio.cli import app
from torchfolio.engine.checks import check_kinds, check_positive
from torchfolio.engine.lock import exclusive
from torchfolio.engine.modes import seeded
from torchfolio.models import MLP

INVOCATIONS = 300


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small bundle, an empty file, a folder that is no bundle, and nothing else."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    arguments = {"in_features": 64, "out_features": 10, "hidden": [4]}
    manifest = Manifest("torchfolio.models:MLP", arguments, (1, 8, 8), tuple(map(str, range(10))))
    save_bundle(MLP(**arguments), tmp_path / "net", manifest)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    return tmp_path


TRAIN = ("train", "--model", "mlp", "--model-set", "hidden=[4]", "--data", "digits", "--epochs", 1, "-o", "new")
BAD = [
    (*TRAIN, "--device", "nope"),
    (*TRAIN, "--device", "cuda:99"),
    (*TRAIN, "--device", "meta"),
    (*TRAIN, "--image-size", 0),
    (*TRAIN, "--image-size", 10**6),
    (*TRAIN, "--model-set", "hidden=[-1]"),
    (*TRAIN, "--model-set", "hidden=-1"),
    (*TRAIN, "--model-set", "hidden=['a']"),
    (*TRAIN, "--model-set", "hidden=[10000000000000]"),
    (*TRAIN, "--lr", "nan"),
    (*TRAIN, "--lr", "-1"),
    (*TRAIN, "--weight-decay", "inf"),
    (*TRAIN, "--precision", "7-bit"),
    (*TRAIN, "--optimizer", "nope"),
    (*TRAIN, "--schedule", "nope"),
    (*TRAIN, "--rule", "nope"),
    (*TRAIN, "--rule", "os:system"),
    (*TRAIN, "--rule", "auglocal", "--rule-set", "loss=1"),
    (*TRAIN, "--rule", "man", "--rule-set", "blocks=1.5"),
    (*TRAIN, "--rule", "man", "--rule-set", "source=auglocal"),
    (*TRAIN, "--rule", "guidance", "--rule-set", "guidance=x"),
    (*TRAIN, "--rule", "noise_mask", "--rule-set", "policy=[1,2]"),
    (*TRAIN, "--rule", "bt2"),
    (*TRAIN, "--add", "guidance", "--add-set", "guide=[1]"),
    (*TRAIN, "--add", "guidance", "--add-set", "guide=net", "--add-set", "batch_dim=x"),
    (*TRAIN, "--add", "gradient_noise", "--add-set", "eta=1e308"),
    (*TRAIN, "--add", "dhkd", "--add-set", "teacher=net", "--add-set", "tau=1e308"),
    (*TRAIN, "--train-size", 0),
    (*TRAIN, "--train-size", -5),
    (*TRAIN, "--test-size", 0),
    (*TRAIN, "--seed", -1),
    (*TRAIN, "--seed", 2**70),
    (*TRAIN, "--data", ""),
    (*TRAIN, "--data", " "),
    (*TRAIN, "--data", "\0"),
    (*TRAIN, "--data", "hf:"),
    (*TRAIN, "-o", "file"),
    (*TRAIN, "-o", "file/net"),
    (*TRAIN, "-o", "other"),
    (*TRAIN, "-o", "net"),
    (*TRAIN, "-o", "x" * 300),
    (*TRAIN, "-o", "/proc/net/x"),
    ("train", "--start", "other", "--data", "digits", "-o", "new"),
    ("eval", "net", "--data", "digits", "--split", "nope"),
    ("eval", "net", "--data", "iris"),
    ("eval", "file", "--data", "digits"),
    ("eval", "net", "--data", "digits", "--device", "nope"),
    ("compress", "net", "--data", "digits", "-o", "net"),
    ("compress", "net", "--data", "digits", "-o", "other"),
    ("compress", "net", "--data", "digits", "-o", "new", "--method", "nope"),
    ("compress", "net", "--data", "digits", "-o", "new", "--method", "auglocal"),
    ("audit", "net", "--data", "digits", "--reference", "nope"),
    ("audit", "net", "--data", "digits", "--device", "nope"),
    ("audit", "net", "--data", "digits", "-o", "file"),
    ("audit", "net", "--input", "nope"),
    ("adapt", "net", "net", "--method", "average", "-o", "other"),
    ("adapt", "net", "net", "--method", "average", "-o", "new", "--data", ""),
    ("adapt", "net", "nope", "--method", "average", "-o", "new"),
    ("inspect", "net", "--data", "digits", "-o", "other"),
    ("inspect", "net", "--data", "digits", "-o", "nope/x.html"),
    ("inspect", "net", "--data", "digits", "--layer", "nope"),
    ("draw", "net", "-o", "nope/x.svg"),
    ("draw", "net", "--input-shape", "0,1"),
    ("run", "convex_relu", "--scale", "smoke", "--device", "nope"),
    ("run", "convex_relu", "--scale", "smoke", "--out", "file"),
    ("run", "nope"),
    ("bench", "nope"),
    ("report", "nope"),
    ("report", "file"),
    ("report", "other", "-o", "nope/x.html"),
    ("demo", "-o", "file"),
    ("list", "--family", "nope"),
    ("show", "nope"),
    ("cite", "nope"),
    ("search", " "),
]


@pytest.mark.parametrize("arguments", BAD, ids=lambda a: " ".join(map(str, a))[:60])
def test_bad_input_is_code_two_before_any_work(place, arguments):
    before = sorted(place.rglob("*"))
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    assert sorted(place.rglob("*")) == before


NOWHERE = [
    (*TRAIN, "-o"),
    ("compress", "net", "--data", "digits", "-o"),
    ("adapt", "net", "net", "--method", "average", "-o"),
    ("audit", "net", "--data", "digits", "-o"),
    ("inspect", "net", "--data", "digits", "-o"),
    ("draw", "net", "-o"),
    ("run", "convex_relu", "--scale", "smoke", "--out"),
    ("run", "convex_relu", "--scale", "smoke", "--record"),
    ("bench", "gbnn", "--record"),
    ("report", "other", "-o"),
    ("demo", "-o"),
]


@pytest.mark.parametrize("arguments", NOWHERE, ids=lambda a: f"{a[0]} {a[-1]}")
def test_a_place_that_cannot_be_written_is_told_at_once(place, arguments):
    """Some commands once told it when all their work was done."""
    done = call(*arguments, "/proc/nothing.svg")
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines() == [
        "torchfolio: /proc/nothing.svg cannot be written: No such file or directory in /proc"
    ]
    assert sorted(p.name for p in place.iterdir()) == ["file", "net", "other"]


@pytest.mark.parametrize("arguments", NOWHERE[6:9] + NOWHERE[10:], ids=lambda a: f"{a[0]} {a[-1]}")
def test_a_file_where_a_folder_belongs_is_told_at_once(place, arguments):
    done = call(*arguments, "file")
    assert (done.exit_code, done.stderr) == (2, "torchfolio: file is a file, expected a folder\n")


@pytest.mark.parametrize(
    "arguments",
    [
        TRAIN[:-2],
        ("compress", "net", "--data", "digits", "--method", "double_rounding", "--epochs", 1),
        ("adapt", "net", "net", "--method", "average"),
        ("audit", "net", "--data", "digits", "--size", 50),
    ],
    ids=lambda a: a[0],
)
def test_what_another_command_writes_is_left_to_it(place, arguments):
    """The later of two once replaced what the earlier had written, without a word."""
    with exclusive(place / "new.training"):
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(call, *arguments, "-o", "new").result()
        assert done.exit_code == 2, done.output
        assert "new.training is in use by" in done.stderr
        assert not (place / "new").exists()
    assert sorted(p.name for p in place.iterdir()) == ["file", "net", "other"]


def test_an_error_nobody_foresaw_is_code_three(monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("torchfolio.catalog.papers", broken)
    done = call("list")
    assert done.exit_code == cli.UNFORESEEN == 3
    assert "KeyError: 'x'" in done.stderr
    assert "please report it" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in call("--debug", "list").stderr


def test_values_of_a_wrong_kind_are_bad_input(monkeypatch):
    monkeypatch.setattr("torchfolio.catalog.papers", lambda: checks.at_least("x", "text", 1))
    assert call("list").exit_code == 2
    monkeypatch.setattr("torchfolio.catalog.papers", lambda: len(5))  # pyright: ignore[reportArgumentType]
    assert call("list").exit_code == 3
    # The same error given on purpose by a module of ours, and by an operation of it that went wrong.
    monkeypatch.setattr("torchfolio.catalog.papers", lambda: check_kinds("net", None))
    assert call("list").exit_code == 2
    monkeypatch.setattr("torchfolio.catalog.papers", lambda: check_positive(x=torch))  # pyright: ignore[reportArgumentType]
    assert call("list").exit_code == 2
    monkeypatch.setattr("torchfolio.catalog.papers", lambda: seeded("x").__enter__())  # pyright: ignore[reportArgumentType]
    assert call("list").exit_code == 3


def test_a_bundle_is_replaced_only_by_force(place):
    refused = call(*TRAIN, "-o", "net")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert call(*TRAIN, "--train-size", 50, "-o", "net", "--force").exit_code == 0


def test_answers_that_are_not_finite_are_no_score(place):
    """Finite weights that overflow gave a loss of `null` and the accuracy of the first class."""
    net = MLP(in_features=64, out_features=10, hidden=[4])
    for parameter in net.parameters():
        torch.nn.init.constant_(parameter, 3e38)
    save_bundle(net, place / "net", load_bundle(place / "net").manifest)
    done = call("eval", "net", "--data", "digits", "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "the answers of net on digits are not finite" in done.stderr


def test_in_a_process_of_its_own(place):
    for arguments, code in ((("show", "nope"), 2), (("list", "--in"), 0), (("search", "zzzz"), 1)):
        done = subprocess.run(
            [sys.executable, "-c", "from torchfolio.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


# Fuzzing

BASES = {
    "train": (*TRAIN, "--train-size", 40, "--test-size", 10),
    "eval": ("eval", "net", "--data", "digits", "--test-size", 10),
    "compress": ("compress", "net", "--data", "digits", "--epochs", 1, "--train-size", 40, "-o", "small"),
    "adapt": ("adapt", "net", "net", "--method", "average", "-o", "merged"),
    "audit": ("audit", "net", "--data", "digits", "--size", 50, "-o", "filter"),
    "inspect": ("inspect", "net", "--data", "digits", "--examples", 16, "-o", "inside.html"),
    "draw": ("draw", "net", "-o", "net.txt"),
    "run": ("run", "convex_relu", "--scale", "smoke", "--set", "nope=1"),
    "bench": ("bench", "nope"),
    "demo": ("demo", "-o", "tour"),
    "report": ("report", "other", "-o", "report.html"),
    "list": ("list",),
    "show": ("show", "auglocal"),
    "cite": ("cite", "man"),
    "search": ("search", "words"),
}
VALUES = ["", " ", "\0", "nope", "file", "other", "net", "net/bundle.json", "nope/nope", "/dev/null", "/proc/1/mem", "..",
          "-1", "0", "1", "2", "1e999", "nan", "1" * 30, "x" * 5000, "a=b", "a=", "=", "x=[[[[", "hidden=[-1]", "é☃",
          "os:system", "a:b", "hf:", "hf:/", "folder:", "folder:nope", "{}", "[]", "None", "%s", "--", "-", "@file"]  # fmt: skip


def options():
    """The names of every command's options, but those that ask for more work."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    left_out = {"--help", "--epochs", "--all", "--ray", "--examples", "--jobs", "--seeds", "--resume"}
    return {
        name: sorted((option, bool(getattr(p, "is_flag", False))) for p in command.params for option in p.opts
                     if option.startswith("--") and option not in left_out)
        for name, command in commands.items()
    }  # fmt: skip


def mutated(chooser: random.Random, base: tuple[object, ...], known: list[tuple[str, bool]]) -> list[str]:
    """A command line with one or two of its words changed, left out or added."""
    words = [str(word) for word in base]
    for _ in range(chooser.choice((1, 1, 2))):
        act = chooser.random()
        if act < 0.65 and known:
            option, is_flag = chooser.choice(known)
            words += [option] if is_flag else [option, chooser.choice(VALUES)]
        elif act < 0.9 and len(words) > 1:
            words[chooser.randrange(1, len(words))] = chooser.choice(VALUES)
        elif len(words) > 1:
            del words[chooser.randrange(1, len(words))]
    return words


def test_fuzzed_command_lines(place, monkeypatch):
    """300 command lines over all commands: exit codes 0, 1 and 2, no traceback."""
    chooser, known = random.Random(12), options()
    monkeypatch.setattr(
        "torchfolio.report.demo.write_demo", lambda folder, say: folder / "demo.html"
    )  # which takes long
    assert set(known) == set(BASES)
    seen = []
    for k in range(INVOCATIONS):
        name = list(BASES)[k % len(BASES)]
        words = mutated(chooser, BASES[name], known[name])
        done = call(*words)
        assert done.exit_code in (0, 1, 2), (words, done.output, done.exception)
        assert isinstance(done.exception, SystemExit | None), (words, done.exception)
        assert "Traceback" not in done.output, words
        if done.exit_code == 0 and "--json" in words and words[words.index("--json") - 1] not in ("-o", "--output"):
            json.loads(done.stdout, parse_constant=pytest.fail)
        seen.append(done.exit_code)
    assert seen.count(2) > INVOCATIONS / 3
    assert seen.count(0) > 20
