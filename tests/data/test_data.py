"""Data: splits that are paired and honest, a cache that notices damage, sentences for what is missing."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from torchfolio.data import CropFlip, DataNotFound, embedded_names, load


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHFOLIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, n=20, test=8, size=(6, 6, 3)):
    """A set in the layout of the hub; pixel (0, 0) tells the example, its label is that modulo 4."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {"info": {"features": {"label": {"names": list("abcd"), "_type": "ClassLabel"}}}}
    start = 0
    for split, count in (("train", n), ("test", test)):
        images, labels = [], []
        for k in range(start, start + count):
            pixels = np.zeros(size, dtype=np.uint8)
            pixels[0, 0] = k
            images.append({"bytes": png(pixels), "path": None})
            labels.append(k % 4)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(images, kind), "label": labels})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), folder / f"{split}.parquet")
        start += count
    return folder


def examples(dataset, splits) -> list[int]:
    return [round(v) for v in (splits.denormalize(dataset.tensors[0])[:, 0, 0, 0] * 255).tolist()]


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_sets(name):
    splits = load(name)
    assert len(splits.val) > 0
    assert len(splits.test) > 0
    x, y = splits.train.tensors
    assert x.dtype == torch.float32
    assert tuple(x.shape[1:]) == splits.shape
    assert y.dtype == (torch.int64 if splits.task == "classification" else torch.float32)
    axes = [0, *range(2, x.dim())]
    torch.testing.assert_close(x.mean(axes), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
    raw = load(name, normalize=False)
    torch.testing.assert_close(splits.denormalize(x), raw.train.tensors[0], atol=1e-3, rtol=1e-3)


def test_embedded_names():
    assert {"digits", "breast_cancer", "wine", "iris", "diabetes"} <= set(embedded_names())


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    from torchfolio.data.embedded import digits

    images, labels = load_digits(return_X_y=True)
    x, y = digits().train
    assert torch.equal(x, torch.from_numpy(images.astype(np.float32)).reshape(-1, 1, 8, 8) / 16)
    assert torch.equal(y, torch.from_numpy(labels))


def test_same_seed_same_examples():
    a, b, c = (
        load("digits", seed=1, train_size=50),
        load("digits", seed=1, train_size=50),
        load("digits", seed=2, train_size=50),
    )
    assert torch.equal(a.train.tensors[0], b.train.tensors[0])
    assert not torch.equal(a.train.tensors[1], c.train.tensors[1])
    whole = load("digits", seed=1, normalize=False)
    part = load("digits", seed=1, train_size=50, normalize=False)
    assert torch.equal(whole.train.tensors[0][:50], part.train.tensors[0])


def rows(part) -> list[bytes]:
    return sorted(x.numpy().tobytes() for x in part.tensors[0])


def noise_folder(folder, n=30):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for k in range(n):
            Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(folder / name / f"{k:03}.png")
    return str(folder)


@pytest.mark.parametrize("name", [*embedded_names(), "folder"])
def test_the_split_belongs_to_the_data(name, tmp_path):
    source = noise_folder(tmp_path / "noise") if name == "folder" else name
    zero, one = (load(source, seed=seed, normalize=False) for seed in (0, 1))
    for part in ("val", "test"):
        assert torch.equal(getattr(zero, part).tensors[0], getattr(one, part).tensors[0])
        assert torch.equal(getattr(zero, part).tensors[1], getattr(one, part).tensors[1])
    assert rows(zero.train) == rows(one.train)
    assert not torch.equal(zero.train.tensors[0], one.train.tensors[0])
    assert zero.split_digest == one.split_digest != ""
    if name == "folder":  # the embedded sets hold some examples twice
        held = {*rows(one.test), *rows(one.val)}
        assert not held & {*rows(zero.train)}
        assert len(held) + len(zero.train) == 60
    few = load(source, seed=5, train_size=20, test_size=10, val=3, normalize=False)
    assert torch.equal(few.test.tensors[0], zero.test.tensors[0][:10])
    assert {*rows(few.train)} <= {*rows(zero.train), *rows(zero.val)}


def test_the_split_of_other_files_is_another(tmp_path):
    source = noise_folder(tmp_path / "noise")
    before = load(source).split_digest
    assert load(source).split_digest == before
    (tmp_path / "noise" / "a" / "000.png").rename(tmp_path / "noise" / "a" / "999.png")
    assert load(source).split_digest != before
    write_parquet(tmp_path / "toy")
    assert load("toy", root=tmp_path).split_digest == "", "the set's own test part stays what it is"


def test_parts_are_read_when_they_are_asked_for_and_travel_whole(tmp_path, monkeypatch):
    from torchfolio.data import splits as module

    read = []
    scaled = module._scaled
    monkeypatch.setattr(module, "_scaled", lambda x, rows, size: (read.append(len(rows)), scaled(x, rows, size))[1])
    data = load(noise_folder(tmp_path / "noise"), train_size=10, test_size=5)
    assert read == [10]
    assert (len(data.val), len(data.test)) == (5, 5)
    copy = pickle.loads(pickle.dumps(data))
    assert read == [10, 5, 5]
    assert torch.equal(copy.test.tensors[0], data.test.tensors[0])
    assert torch.equal(copy.val[2][0], data.val[2][0])
    assert all(torch.equal(a, b) for a, b in zip(copy.marks, data.marks, strict=True))
    assert len(read) == 3


def test_one_image_a_class_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="2 examples of 2 classes, too few to hold a test part out"):
        load(noise_folder(tmp_path / "noise", n=1))
    two = load(noise_folder(tmp_path / "two", n=2))
    assert (len(two.train), len(two.val), len(two.test)) == (1, 1, 2)


def test_settled_files_are_read_through_once(tmp_path, monkeypatch):
    from torchfolio.data import cache

    write_parquet(tmp_path / "toy")
    monkeypatch.setattr(cache, "SETTLED", -1.0)  # as if they had been there for long
    first = load("toy", root=tmp_path)
    load("toy", root=tmp_path)

    def refuse(*arguments):
        raise AssertionError("read through again")

    monkeypatch.setattr(cache, "_content_key", refuse)
    monkeypatch.setattr(cache, "_checksum", refuse)
    again = load("toy", root=tmp_path)
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])


def test_splits_do_not_overlap_and_keep_the_published_test_part(tmp_path):
    write_parquet(tmp_path / "toy")
    splits = load("toy", root=tmp_path, val=5, seed=3)
    train, val, test = (examples(part, splits) for part in (splits.train, splits.val, splits.test))
    assert sorted(train + val) == list(range(20))
    assert sorted(test) == list(range(20, 28))
    assert len(val) == 5
    assert splits.classes == ("a", "b", "c", "d")
    assert [k % 4 for k in train] == splits.train.tensors[1].tolist()


def test_statistics_are_those_of_the_training_part():
    splits = load("wine", normalize=False)
    x = splits.train.tensors[0].double()
    torch.testing.assert_close(splits.mean.double(), x.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(splits.std.double(), x.std(0, correction=0), rtol=1e-6, atol=1e-6)


def test_constant_features_are_left_finite(tmp_path):
    write_parquet(tmp_path / "toy", size=(6, 6, 3))
    assert load("digits").train.tensors[0].isfinite().all()
    assert (load("digits").std > 0).all()


def test_images_are_box_downsampled(tmp_path):
    write_parquet(tmp_path / "toy")
    big = load("toy", root=tmp_path, normalize=False)
    small = load("toy", root=tmp_path, normalize=False, image_size=3)
    torch.testing.assert_close(small.train.tensors[0], torch.nn.functional.avg_pool2d(big.train.tensors[0], 2))
    assert load("toy", root=tmp_path, image_size=4).shape == (3, 4, 4)


def test_environment_names_the_folders(tmp_path, monkeypatch):
    write_parquet(tmp_path / "b" / "toy")
    monkeypatch.setenv("TORCHFOLIO_DATA", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert len(load("toy").test) == 8


def test_image_folders(tmp_path):
    for split in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(np.full((5, 7, 3), 100 * k + i, np.uint8)).save(tmp_path / split / name / f"{i}.png")
    splits = load(f"folder:{tmp_path}", image_size=4)
    assert splits.classes == ("cat", "dog")
    assert splits.shape == (3, 4, 4)
    assert len(splits.test) == 12
    flat = load(str(tmp_path / "train"), image_size=4)
    assert len(flat.train) + len(flat.val) + len(flat.test) == 12


def test_unequal_images_ask_for_a_size(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for side in (5, 6):
            Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / name / f"{side}.png")
    with pytest.raises(ValueError, match="pass image_size"):
        load(str(tmp_path))
    assert load(str(tmp_path), image_size=4, val=0).shape == (1, 4, 4)


def test_broken_image_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name / "0.png")
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b/1\.png cannot be read"):
        load(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncate", "flip", "half", "garbage"])
def test_damaged_cache_is_noticed_and_made_anew(tmp_path, own_cache, damage):
    write_parquet(tmp_path / "toy")
    before = load("toy", root=tmp_path).train.tensors[0]
    for x in own_cache.rglob("x.npy"):
        content = bytearray(x.read_bytes())
        if damage == "truncate":
            x.write_bytes(content[:200])
        elif damage == "flip":
            content[-1] ^= 255
            x.write_bytes(content)
        elif damage == "half":
            (x.parent / "manifest.json").unlink()
        else:
            (x.parent / "manifest.json").write_text("[]")
    assert torch.equal(load("toy", root=tmp_path).train.tensors[0], before)
    assert not list(own_cache.rglob(".new-*"))


def test_changed_files_are_read_again(tmp_path):
    write_parquet(tmp_path / "toy")
    load("toy", root=tmp_path)
    write_parquet(tmp_path / "toy", n=24)
    splits = load("toy", root=tmp_path)
    assert len(splits.train) + len(splits.val) == 24


def test_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    write_parquet(tmp_path / "toy")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHFOLIO_CACHE", str(tmp_path / "file"))
    assert len(load("toy", root=tmp_path).test) == 8


@pytest.mark.parametrize("name", ["cifar10", "hf:nobody/nothing"])
def test_hub_that_cannot_be_reached_is_told_in_a_sentence(name, monkeypatch):
    monkeypatch.delenv("TORCHFOLIO_DATA", raising=False)

    def refuse(repository):
        raise ConnectionError("offline")

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataNotFound, match="TORCHFOLIO_DATA"):
        load(name)


def test_hub_sets_are_read(monkeypatch):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    images = [Image.fromarray(np.full((4, 4, 3), k, np.uint8)) for k in range(10)]
    part = datasets.Dataset.from_dict({"image": images, "label": [k % 2 for k in range(10)]}, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda repository: datasets.DatasetDict({"train": part, "test": part})
    )
    splits = load("hf:somebody/pictures")
    assert splits.classes == ("x", "y")
    assert splits.shape == (3, 4, 4)
    numbers = datasets.Dataset.from_dict({"a": [0.5] * 10, "b": list(range(10)), "label": [0, 1] * 5})
    monkeypatch.setattr(datasets, "load_dataset", lambda repository: datasets.DatasetDict({"train": numbers}))
    assert load("hf:somebody/table").shape == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digts"}, "Did you mean digits"),
        ({"name": "folder:/no/such"}, "is no folder"),
        ({"name": "digits", "train_size": 99999}, "train_size"),
        ({"name": "digits", "test_size": 0}, "test_size"),
        ({"name": "digits", "val": 1.5}, "share"),
        ({"name": "digits", "val": 99999}, "hold out"),
        ({"name": "wine", "image_size": 4}, "for images"),
        ({"name": "digits", "image_size": 0}, "image_size"),
    ],
)
def test_bad_requests(arguments, message, monkeypatch):
    monkeypatch.delenv("TORCHFOLIO_DATA", raising=False)
    with pytest.raises((ValueError, DataNotFound), match=message):
        load(**arguments)


def test_labels_out_of_range_are_refused(tmp_path):
    write_parquet(tmp_path / "toy")
    path = tmp_path / "toy" / "train.parquet"
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(1, "label", pa.array([9] * 20)).replace_schema_metadata(table.schema.metadata), path
    )
    with pytest.raises(ValueError, match="labels from"):
        load("toy", root=tmp_path)


def test_crops_and_flips_are_of_the_image():
    x = torch.arange(2 * 1 * 6 * 6.0).view(2, 1, 6, 6)
    x = x.expand(2, 3, 6, 6).repeat(50, 1, 1, 1)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for image, source in zip(CropFlip(2)(x, torch.Generator().manual_seed(0)), padded, strict=True):
        found = [
            (i, j, flip)
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
            if torch.equal(
                image, (source[:, i : i + 6, j : j + 6].flip(2) if flip else source[:, i : i + 6, j : j + 6])
            )
        ]
        assert found
        seen.add(found[0])
    assert len(seen) > 25, "each image has offsets of its own"


def test_augmentation_repeats_with_its_seed_and_keeps_the_dtype():
    x = torch.rand(8, 3, 6, 6, dtype=torch.float64)
    a, b = (CropFlip(1)(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.dtype == torch.float64
    assert torch.equal(CropFlip(0, flip=False)(x), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropFlip(-1), "padding"),
        (lambda: CropFlip(mode="wrap"), "mode"),
        (lambda: CropFlip(9)(torch.zeros(1, 3, 8, 8)), "below"),
        (lambda: CropFlip()(torch.zeros(3, 8, 8)), "batch of images"),
    ],
)
def test_bad_augmentation(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cifar10(real_data):
    splits = load("cifar10", root=real_data, train_size=500, test_size=200)
    assert splits.classes[0] == "airplane"
    assert splits.shape == (3, 32, 32)
    assert (len(splits.train), len(splits.test)) == (500, 200)


def test_mnist10k(real_data):
    splits = load("mnist10k", root=real_data)
    assert splits.shape == (1, 28, 28)
    assert len(splits.test) == 2000


@pytest.mark.parametrize("name", ["", " ", "folder:", "hf:", "hf:/", "hf:a", "hf:a/b/c"])
def test_names_that_name_nothing(name):
    with pytest.raises(DataNotFound, match="expected"):
        load(name)


def test_a_name_is_text():
    with pytest.raises(TypeError, match="as text, got int"):
        load(3)  # type: ignore[arg-type]
