"""The catalogue: every file follows the schema, search finds what people mean, citations are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torchfolio
from torchfolio import catalog
from torchfolio.catalog import CatalogError, bibtex, citations, paper, papers, read, search

PAPERS = Path(catalog.__file__).parent.parent / "papers"


def test_all_papers_are_there():
    known = papers()
    assert len(known) == 56
    assert list(known) == sorted(known)
    assert {p.family for p in known.values()} == set(catalog.FAMILIES)
    assert all(p.claims for p in known.values())


def test_what_is_in_is_read_off_the_tree():
    assert paper("auglocal").is_in
    assert paper("auglocal").module == "torchfolio.local.auglocal"
    for found in papers().values():
        experiment = PAPERS.parent / "experiments" / f"{found.slug}.py"
        assert not found.is_in or experiment.is_file()


def test_unknown_slug_names_the_nearest():
    with pytest.raises(CatalogError, match="did you mean auglocal"):
        paper("auglocla")
    with pytest.raises(CatalogError, match="no claim 'x'"):
        paper("auglocal").claim("x")


GOOD = (PAPERS / "auglocal.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title = ", "titel = "), r"bad\.toml: titel is not a field.*title"),
        (('family = "local"', 'family = "locl"'), r"bad\.toml: family is 'locl'"),
        (("year = 2024", 'year = "2024"'), r"bad\.toml: year is a str, expected int"),
        (("year = 2024", "year = 24"), r"bad\.toml: year is 24"),
        (('venue = "ICLR 2024"\n', ""), r"bad\.toml: venue is missing"),
        (('venue = "ICLR 2024"', 'venue = ""'), r"bad\.toml: venue is empty"),
        (('arxiv = "2402.17318"', 'arxiv = "24.1"'), r"bad\.toml: arxiv"),
        (("https://github.com", "ftp://github.com"), r"bad\.toml: code\.url"),
        (('id = "memory"', 'id = "accuracy"'), r"bad\.toml: claims\[1\]\.id"),
        (('id = "memory"', 'id = "Memory use"'), r"bad\.toml: claims\[1\]\.id"),
        (("tags = [", "tags = [3, "), r"bad\.toml: tags"),
        (("title", "title = "), r"bad\.toml: not valid TOML"),
    ],
)
def test_schema_names_file_and_field(tmp_path, change, message):
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace(*change), encoding="utf-8")
    with pytest.raises(CatalogError, match=message):
        read(path)


def test_a_slug_is_an_identifier(tmp_path):
    path = tmp_path / "not-a-slug.toml"
    path.write_text(GOOD, encoding="utf-8")
    with pytest.raises(CatalogError, match="identifier"):
        read(path)


@pytest.mark.parametrize(
    ("words", "slug"),
    [
        ("detect a poisoned model without clean data", "umd"),
        ("train spiking network with less memory", "sltt"),
        ("merge checkpoints", "dam"),
        ("merging checkpoint", "dam"),
        ("grokking", "xor_grokking"),
        ("binary weights", "biper"),
        ("knowledge distilation", "dhkd"),
        ("hopfield networks", "multitasking_hopfield"),
        ("graph neural network forward only", "forwardgnn"),
        ("predict clicks", "final_mlp"),
        ("finetune diffusion model", "sara"),
        ("quantisation switching bit width", "double_rounding"),
        ("backdor input filter", "badexpert"),
        ("jamming", "jamming_detection"),
    ],
)
def test_search_finds_what_is_meant(words, slug):
    assert search(words, 3)[0][0].slug == slug


def test_search_without_words():
    with pytest.raises(CatalogError, match="words"):
        search("  ")
    assert search("zzzzqqqq") == []


def test_bibtex():
    entry = bibtex(paper("auglocal"))
    assert entry.startswith("@inproceedings{auglocal,")
    assert "booktitle = {ICLR}" in entry
    assert "eprint = {2402.17318}" in entry
    assert bibtex(paper("gbnn")).startswith("@article")
    assert bibtex(paper("boundary_tilting")).startswith("@misc")
    assert citations(["auglocal", "man"]).count("@") == 2


def test_all_entries_are_balanced():
    for found in papers().values():
        entry = bibtex(found)
        assert entry.count("{") == entry.count("}")
        assert not re.search(r"(?<!\\)[&%#]", entry)


def test_the_door_shows_the_floors():
    """Of a package what it imports itself is no part."""
    shown = {name for name in dir(torchfolio) if not name.startswith("_")}
    assert {"engine", "data", "measure", "models", "catalog", "local", "theory", "backdoor"} <= shown
    folder = Path(torchfolio.__file__).parent
    assert all((folder / name).is_dir() or (folder / f"{name}.py").exists() for name in shown)
