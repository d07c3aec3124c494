"""Text, graphs and ratings: known sizes and known values of the real files, small files made here otherwise."""

from __future__ import annotations

import pickle

import pytest
import torch

from torchfolio.data import DataNotFound, load
from torchfolio.data.graphs import planetoid
from torchfolio.data.places import folder_of
from torchfolio.data.ratings import movielens
from torchfolio.data.text import encode, movie_reviews, multi30k, tiny_shakespeare, train_tokenizer


def needs(name, file):
    try:
        folder_of(name, file)
    except DataNotFound:
        pytest.skip(f"{name} is not in TORCHFOLIO_DATA")


def test_movie_reviews():
    needs("movie_reviews", "rt-polarity.pos")
    parts = movie_reviews()
    assert [len(parts[p]) for p in ("train", "val", "test")] == [8530, 1066, 1066]
    assert movie_reviews() == parts
    everything = [text for part in parts.values() for text in part.texts]
    assert len(everything) == 10662
    assert 0.45 < sum(parts["test"].targets) / 1066 < 0.55


def test_movie_reviews_as_numbers():
    needs("movie_reviews", "rt-polarity.pos")
    pytest.importorskip("tokenizers")
    splits = load("movie_reviews", train_size=50)
    x = splits.test.tensors[0]
    assert (x.dtype, x.shape, len(splits.train), splits.shape) == (torch.int64, (1066, 64), 50, (64,))
    assert (splits.classes, splits.normalized, len(splits.mean)) == (("negative", "positive"), False, 0)
    assert splits.text(torch.tensor([splits.vocabulary.index("film"), 0])) == "film"
    assert int(x.max()) < len(splits.vocabulary) <= 8000
    said = {text.lower().replace(" ", "") for text in movie_reviews()["test"].texts}
    whole = [t for t in map(splits.text, x) if "[UNK]" not in t]
    assert len(whole) > 50
    assert sum(t.replace(" ", "") in said for t in whole) >= len(whole) - 5, "few are cut at 64 words"
    with pytest.raises(ValueError, match="set of text"):
        load("movie_reviews", image_size=8)


def test_multi30k():
    needs("multi30k", "train.en.gz")
    parts = multi30k()
    assert [len(p) for p in parts.values()] == [29000, 1014, 1000]
    assert parts["test"].texts[0] == "A man in an orange hat starring at something."
    assert parts["test"].targets[0] == "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt."
    with pytest.raises(ValueError, match="source"):
        multi30k("fr")


def test_tiny_shakespeare():
    needs("tiny_shakespeare", "input.txt")
    parts = tiny_shakespeare()
    assert sum(map(len, parts.values())) == 1115394
    assert parts["train"].startswith("First Citizen:")


@pytest.mark.parametrize(("name", "nodes", "edges", "classes"), [("cora", 2708, 10556, 7), ("citeseer", 3327, 9104, 6)])
def test_planetoid(name, nodes, edges, classes):
    needs("planetoid", "ind.cora.tx")
    graph = planetoid(name)
    assert (graph.num_nodes, graph.edge_index.shape[1], graph.num_classes) == (nodes, edges, classes)
    assert [int(m.sum()) for m in (graph.train_mask, graph.val_mask, graph.test_mask)] == [20 * classes, 500, 1000]
    assert not (graph.train_mask & graph.test_mask).any()
    sums = graph.x.sum(1)
    assert torch.allclose(sums[sums > 0], torch.ones(int((sums > 0).sum())))
    i, j = graph.edge_index
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == set(zip(j.tolist(), i.tolist(), strict=True))


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_hostile_graph_runs_nothing(tmp_path, capsys):
    folder = tmp_path / "planetoid"
    folder.mkdir()
    (folder / "ind.cora.tx").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(ValueError, match=r"ind\.cora\.tx cannot be read: it names .*print"):
        planetoid(root=tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_movielens():
    needs("ml-100k", "u.data")
    frame = movielens()
    assert len(frame) == 100_000
    assert (frame.user.nunique(), frame.item.nunique()) == (943, 1682)
    assert frame.timestamp.is_monotonic_increasing
    assert frame[frame.item == 1].title.iloc[0] == "Toy Story (1995)"
    assert frame[frame.item == 1].genres.iloc[0] == "animation|children|comedy"


def test_a_missing_set_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHFOLIO_DATA", str(tmp_path))
    for call in (movie_reviews, multi30k, tiny_shakespeare, planetoid, movielens):
        with pytest.raises(DataNotFound, match=str(tmp_path)):
            call()


@pytest.mark.parametrize("model", ["word", "bpe", "char"])
def test_tokenizer(model):
    pytest.importorskip("tokenizers")
    texts = ["The cat sat.", "The dog sat, too."]
    made = train_tokenizer(texts, 60, model=model)
    ids = encode(made, texts, 24, ends=True)
    assert ids.shape == (2, 24)
    assert ids[:, 0].tolist() == [2, 2]
    assert ((ids == 3).sum(1) == 1).all()
    assert made.encode("sat").ids == made.encode("SAT").ids
    assert 1 not in ids.tolist()[0]
    assert encode(made, texts, 3, ends=True)[:, -1].tolist() == [3, 3]
    unknown = encode(made, ["é"], 4)[0]
    assert 1 in unknown.tolist()
