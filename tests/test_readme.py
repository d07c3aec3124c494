"""What the README says is true: its examples run, its table is the catalogue's."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(language: str) -> str:
    found = re.search(rf"<!-- example: {language} -->\n```{language}\n(.*?)```", README, re.S)
    assert found is not None
    return found.group(1)


def environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "OMP_NUM_THREADS": "1"}


def test_python_example(tmp_path):
    code = example("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"'accuracy': ([0-9.]+)", done.stdout)[1]) > 0.8


@pytest.mark.slow
def test_command_line_example(tmp_path):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example("bash")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "net" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_combinations_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "combine.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 4
    command = [sys.executable, "-W", "error", "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    scores = [float(score) for score in re.findall(r"'accuracy': ([0-9.]+)", done.stdout)]
    assert len(scores) == 4
    assert min(scores) > 0.85
    assert "not suspicious" in done.stdout
    one, four = (float(score) for score in re.findall(r"networks: ([0-9.]+)", done.stdout))
    assert four > max(one, 0.8)


def test_what_follows_from_the_catalogue_is_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stale = [path.name for path, text in module.generated().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "run: python docs/generate.py"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
