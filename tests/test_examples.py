"""The script on every method's page runs as it stands, without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchfolio import catalog

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SLUGS = sorted(paper.slug for paper in catalog.papers().values() if paper.is_in)


@pytest.mark.parametrize("slug", SLUGS)
def test_example(slug, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(EXAMPLES / f"{slug}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.strip()


def test_no_example_is_left_over():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SLUGS)
