"""Learning rules in other people's loops: the scripts that the pages show run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NEEDS = {
    "own_loop": (),
    "lightning_module": ("pytorch_lightning",),
    "hugging_face_trainer": ("transformers", "accelerate"),
}


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_script(name, tmp_path):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    command = [sys.executable, str(DOCS / "scripts" / f"{name}.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    scores = re.findall(r"'accuracy': ([0-9.]+)", done.stdout)
    assert scores
    assert min(map(float, scores)) > 0.8, done.stdout


def test_every_script_is_on_a_page():
    shown = {name for page in DOCS.glob("*.md") for name in re.findall(r"<!-- script: (\w+) -->", page.read_text())}
    assert shown == {path.stem for path in (DOCS / "scripts").glob("*.py")} == set(NEEDS)


def test_every_measured_table_has_its_script():
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"<!-- measured: (\w+) -->", page.read_text(encoding="utf-8")):
            assert (DOCS / "measured" / f"{name}.json").is_file(), page
            assert (DOCS / "assets" / f"{name}.svg").is_file(), page
            assert (DOCS.parent / "benchmarks" / f"{name}.py").is_file(), page


def test_examples_become_notebooks(tmp_path):
    import ast
    import json

    from tests.test_reference import load_hooks

    hooks = load_hooks()
    for path in (DOCS / "examples").glob("*.py"):
        script = path.read_text(encoding="utf-8")
        made = json.loads(hooks.notebook(script))
        assert (made["nbformat"], made["cells"][0]["cell_type"]) == (4, "markdown")
        code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"][1:]
        written = ast.parse(script.partition("\n")[2].replace("  # fmt: skip", ""))
        assert ast.dump(ast.parse("\n\n".join(code))) == ast.dump(written), path.stem
        assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
