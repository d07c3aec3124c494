"""One idea a file: a paper's own file stays short, or its docstring says why it cannot."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import torchfolio
from torchfolio import catalog

ROOT = Path(torchfolio.__file__).parent.parent
AIM = 300  # lines


def own_files(paper: catalog.Paper) -> list[Path]:
    """The file of a paper's method, or those of its package."""
    place = ROOT.joinpath(*paper.module.split("."))
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


@pytest.mark.parametrize("paper", catalog.papers().values(), ids=lambda paper: paper.slug)
def test_a_long_file_says_why(paper):
    for file in own_files(paper):
        text = file.read_text()
        reason = (ast.get_docstring(ast.parse(text)) or "").lower()
        assert text.count("\n") <= AIM or "longer than most" in reason, (
            f"{file.name} has {text.count(chr(10))} lines, expected at most {AIM}, or in its docstring the reason: "
            "'Longer than most because ...'"
        )
