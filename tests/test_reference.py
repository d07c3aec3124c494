"""Every public name stands in the reference; the strict build of the docs compares them with what it has built."""

from __future__ import annotations

import ast
import importlib.util
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load_hooks():
    """The module of the docs' build."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    return load_hooks()


def test_public_names_are_those_of_all_and_of_offers(hooks):
    names = hooks.public_names()
    for full in ("torchfolio.engine.fit", "torchfolio.local.auglocal.AugLocal", "torchfolio.bundle.save_bundle",
                 "torchfolio.runs.plots.curves", "torchfolio.diagrams.graph.Graph", "torchfolio.shown.Shown"):  # fmt: skip
        assert full in names
    assert not any(name.startswith(("torchfolio.cli", "torchfolio.experiments", "torchfolio.peers")) for name in names)


def test_what_is_missing_is_named(hooks, tmp_path):
    everything = set(hooks.public_names())
    assert hooks.missing_names(everything) == []
    assert hooks.missing_names(everything - {"torchfolio.shown.Shown"}) == ["torchfolio.shown.Shown"]
    moved = everything - {"torchfolio.engine.fit"} | {"torchfolio.engine.fit.fit"}
    assert hooks.missing_names(moved) == [], "shown in the module below that defines it"
    lines = "\n".join(f"{name} py:function 1 x.html -" for name in sorted(everything))
    head = b"# Sphinx inventory version 2\n# Project: x\n# Version: 0\n# The rest is compressed by zlib.\n"
    (tmp_path / "objects.inv").write_bytes(head + zlib.compress(lines.encode()))
    assert hooks.documented(tmp_path / "objects.inv") == everything
    (tmp_path / "other.inv").write_bytes(b"something else")
    with pytest.raises(ValueError, match="no inventory"):
        hooks.documented(tmp_path / "other.inv")


def test_every_public_function_and_class_has_a_docstring(hooks):
    bare, names = [], hooks.public_names()
    for path in hooks.SOURCE.rglob("*.py"):
        public = {full.rpartition(".")[2] for full, place in names.items() if _is_at(place, path, hooks)}
        for node in ast.parse(path.read_text(encoding="utf-8")).body if public else []:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
                overload = any("overload" in ast.unparse(d) for d in node.decorator_list)
                bare += [f"{path.stem}.{node.name}"] if not overload and not ast.get_docstring(node) else []
    assert not bare


def _is_at(place, path, hooks):
    return place == ".".join(("torchfolio", *path.relative_to(hooks.SOURCE).with_suffix("").parts))


def test_formulas_need_no_script(hooks):
    pytest.importorskip("latex2mathml")
    page = r'a <span class="arithmatex">\(x \lt y_1^2\)</span> <div class="arithmatex">\[\arg\max_i x_i\]</div>'
    made = hooks.on_page_content(page, None, None, None)
    assert made.count("<math") == 2
    assert 'display="block"' in made
    assert "\\" not in made


@pytest.mark.long
def test_a_built_site_shows_every_public_name(hooks, tmp_path):
    import subprocess

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hooks.missing_names(hooks.documented(tmp_path / "site" / "objects.inv")) == []
