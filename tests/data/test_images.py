"""Images and labels as files hold them: decoded as a person sees them, refused in one sentence that names the file."""

from __future__ import annotations

import io
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from torchfolio.data import load
from torchfolio.data.images import decode, list_folder, read_parquet
from torchfolio.data.sources import DataNotFound


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHFOLIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def encoded(image, kind="PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **settings)
    return buffer.getvalue()


def one(item) -> np.ndarray:
    return decode([item], ["it"])[0]


def folder_of(root, classes=("a", "b"), count=4, pixels=None):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((4, 4, 3), 20 * i + k, np.uint8) if pixels is None else pixels).save(root / name / f"{i}.png")  # fmt: skip
    return root


def table_of(path, labels, size=4, images=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [encoded(np.full((size, size, 3), k, np.uint8)) for k in range(len(labels))]
    rows = [{"bytes": item, "path": None} for item in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": labels}), path)
    return path


def test_every_orientation_is_turned_as_people_see_it():
    seen = np.zeros((2, 3), np.uint8)
    seen[0, 0], seen[0, 2], seen[1, 0] = 255, 180, 90  # three corners tell all eight ways apart
    stored = {
        1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.T, 6: np.rot90(seen), 7: seen[::-1, ::-1].T,
        8: np.rot90(seen, -1),
    }  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            item = encoded(np.ascontiguousarray(pixels), kind, exif=exif)
            np.testing.assert_array_equal(one(item)[0], seen, err_msg=f"{orientation} {kind}")
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.kron(np.rot90(seen), np.ones((16, 16), np.uint8))
    assert decode([encoded(np.ascontiguousarray(wide), "JPEG", exif=exif)], ["it"]).shape == (1, 1, 32, 48)


def test_what_is_transparent_shows_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 255, 128)
    wanted = np.array([[255, 255, 255], [200, 0, 0], [227, 127, 127]])
    np.testing.assert_allclose(one(encoded(rgba))[:, 0].T, wanted, atol=1)
    grey = np.stack([np.full((1, 2), 10, np.uint8), np.array([[0, 255]], np.uint8)], 2)
    np.testing.assert_array_equal(one(encoded(Image.fromarray(grey))), [[[255, 10]]])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    np.testing.assert_array_equal(one(encoded(palette, transparency=0))[:, 0].T, [[255, 255, 255], [50, 60, 70]])


def test_sixteen_bits_are_scaled_not_cut():
    np.testing.assert_array_equal(one(encoded(np.array([[0, 257, 32896, 65535]], np.uint16))), [[[0, 1, 128, 255]]])
    with pytest.raises(ValueError, match="floating-point"):
        one(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_colour_image_makes_all_of_them_colour(odd):
    grey, colour = np.full((2, 2), 7, np.uint8), np.full((2, 2, 3), (1, 2, 3), np.uint8)
    x = decode([encoded(colour if k == odd else grey) for k in range(3)], list("abc"))
    assert x.shape == (3, 3, 2, 2)
    assert x[odd, :, 0, 0].tolist() == [1, 2, 3]
    assert x[odd - 1, :, 0, 0].tolist() == [7, 7, 7]


def test_train_and_test_have_the_same_channels(tmp_path):
    folder_of(tmp_path / "s" / "train", pixels=np.full((4, 4), 9, np.uint8))
    folder_of(tmp_path / "s" / "test")
    splits = load(f"folder:{tmp_path / 's'}")
    assert splits.train.tensors[0].shape[1:] == splits.test.tensors[0].shape[1:] == (3, 4, 4)


def test_what_is_hidden_is_passed_over_at_every_level(tmp_path):
    root = folder_of(tmp_path / "s")
    for name in (
        "a/._00.png",
        "a/.ipynb_checkpoints/0.png",
        "__MACOSX/a/._0.png",
        ".git/x.png",
        "b/deep/__MACOSX/0.png",
        "a/.DS_Store",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"junk")
    (root / "a" / "folder.png").mkdir()
    paths, _, classes = list_folder(root)
    assert classes == ("a", "b")
    assert len(paths) == 8
    table_of(tmp_path / "p" / "train.parquet", [0, 1] * 5)
    (tmp_path / "p" / "._train.parquet").write_bytes(b"junk")
    assert load(f"folder:{tmp_path / 'p'}").num_classes == 2


@pytest.mark.parametrize("which", ["a/0.png", "b/2.png"])
@pytest.mark.parametrize("content", [b"junk", b"", None])
def test_a_corrupt_file_is_named_whether_first_or_later(tmp_path, which, content):
    root = folder_of(tmp_path / "s", pixels=np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8))
    good = (root / which).read_bytes()
    (root / which).write_bytes(good[: len(good) // 2] if content is None else content)
    with pytest.raises(ValueError, match=rf"{which} cannot be read as an image: ") as caught:
        load(f"folder:{root}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 10**9], "the labels 0, 1000000000, expected 0 to 1 without gaps"),
        ([10, 20, 30], "the labels 10, 20, 30, expected 0 to 2"),
        ([1, 2, 3], "the labels 1, 2, 3, expected 0 to 2"),
        ([-1, -1], "row 0 of .*train.parquet has the label -1"),
        ([0, -1], "row 1 of .* has the label -1"),
        ([0, 2**40], "row 1 of .* has the label 1099511627776"),
        ([0, 0.5], r"row 1 of .* has the label 0\.5"),
        ([0.0, float("nan")], "row 1 of .* has the label nan"),
        ([0, None], "row 1 of .* has no label"),
        (["a", None], "row 1 of .* has no label"),
        ([[0], [1]], "labels of type list"),
    ],
)
def test_labels_that_name_no_class_are_refused_at_once(tmp_path, labels, message):
    table_of(tmp_path / "s" / "train.parquet", labels)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        load(f"folder:{tmp_path / 's'}")
    assert time.perf_counter() - started < 2


def test_labels_of_text_are_classes_in_every_file(tmp_path):
    table_of(tmp_path / "s" / "train-0.parquet", ["dog", "cat"] * 5)
    table_of(tmp_path / "s" / "train-1.parquet", ["cow", "dog"] * 5)
    table_of(tmp_path / "s" / "test-0.parquet", ["cow", "cat"])
    splits = load(f"folder:{tmp_path / 's'}", val=0)
    assert sorted(splits.classes) == ["cat", "cow", "dog"]
    assert sorted(splits.classes[k] for k in splits.test.tensors[1]) == ["cat", "cow"]
    counts = [sum(splits.classes[k] == name for k in splits.train.tensors[1]) for name in ("cat", "cow", "dog")]
    assert counts == [5, 5, 10]


def test_whole_numbers_may_be_stored_as_floats_or_truths(tmp_path):
    for labels in ([0.0, 1.0, 1.0], [False, True, True], pa.array(["a", "b", "b"]).dictionary_encode()):
        _, y, _ = read_parquet(table_of(tmp_path / "t.parquet", labels))
        assert y.tolist() == [0, 1, 1]


def test_other_sizes_and_missing_images_are_refused(tmp_path):
    table_of(tmp_path / "s" / "train.parquet", [0, 1] * 5)
    table_of(tmp_path / "s" / "test.parquet", [0, 1], size=5)
    with pytest.raises(ValueError, match=r"\(3, 4, 4\) in train and \(3, 5, 5\) in test; pass image_size"):
        load(f"folder:{tmp_path / 's'}")
    assert load(f"folder:{tmp_path / 's'}", image_size=4).shape == (3, 4, 4)
    table_of(tmp_path / "s" / "train-1.parquet", [0, 1], size=6)
    with pytest.raises(ValueError, match=r"train-1\.parquet and .*train\.parquet; pass image_size"):
        load(f"folder:{tmp_path / 's'}")
    with pytest.raises(
        ValueError, match=r"image 1 of .*m\.parquet cannot be read as an image: expected an encoded image"
    ):
        read_parquet(table_of(tmp_path / "m.parquet", [0, 1], images=[encoded(np.zeros((2, 2), np.uint8)), None]))
    (tmp_path / "j.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"j\.parquet cannot be read as a Parquet file"):
        read_parquet(tmp_path / "j.parquet")


@pytest.mark.parametrize("name", ["", "  ", "folder:", "folder: "])
def test_a_name_of_nothing_names_no_set(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHFOLIO_DATA", str(folder_of(tmp_path / "s")))
    with pytest.raises(DataNotFound, match="expected the name of a data set"):
        load(name)


def test_what_storage_leaves_behind_is_no_class_and_no_image(tmp_path):
    for name in ("a/0.png", "a/@eaDir/0.png", "b/0.png", "b/1.png", "a/1.png", "#recycle/x.png", "$RECYCLE.BIN/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    paths, _, classes = list_folder(tmp_path)
    assert classes == ("a", "b")
    assert len(paths) == 4


def test_one_class_is_none(tmp_path):
    encoded = io.BytesIO()
    Image.new("L", (4, 4)).save(encoded, "PNG")
    for label in (0, "cat"):
        pq.write_table(
            pa.table({"image": [{"bytes": encoded.getvalue(), "path": None}] * 6, "label": [label] * 6}),
            tmp_path / "train.parquet",
        )
        with pytest.raises(ValueError, match="for the label of all its examples, expected two classes or more"):
            load(str(tmp_path))


def test_unequal_images_of_tables_are_brought_to_one_size(tmp_path):
    mixed = [encoded(np.full((4 + k % 2, 4), 9, np.uint8)) for k in range(10)]
    table_of(tmp_path / "m" / "train.parquet", [0, 1] * 5, images=mixed)
    table_of(tmp_path / "s" / "train-0.parquet", [0, 1] * 5)
    table_of(tmp_path / "s" / "train-1.parquet", [0, 1] * 5, size=6)
    for name, shape in (("m", (1, 4, 4)), ("s", (3, 4, 4))):
        with pytest.raises(ValueError, match="pass image_size"):
            load(str(tmp_path / name))
        assert load(str(tmp_path / name), image_size=4).shape == shape


@pytest.mark.parametrize(("train", "other"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "eval")])
def test_splits_by_the_names_that_they_go_by(tmp_path, train, other):
    """Read as classes, the network would learn to tell the training set from the test set."""
    folder_of(tmp_path / "f" / train, count=20, pixels=np.zeros((4, 4), np.uint8))
    folder_of(tmp_path / "f" / other, count=3)
    table_of(tmp_path / "p" / f"{train}_0.parquet", [0, 1] * 20)
    table_of(tmp_path / "p" / f"{other}.0001.parquet", [0, 1] * 3)
    for kind in ("f", "p"):
        splits = load(str(tmp_path / kind))
        assert (splits.num_classes, len(splits.train) + len(splits.val), len(splits.test)) == (2, 40, 6)


def test_splits_that_cannot_be_told(tmp_path):
    for name in ("train", "test", "eval"):
        folder_of(tmp_path / "two" / name)
        folder_of(tmp_path / "none" / name.replace("train", "val"))
    for name in ("train", "extra"):
        table_of(tmp_path / "odd" / f"{name}.parquet", [0, 1] * 5)
    for name, message in (("two", "has both eval and test, which mean the same split"), ("odd", "extra.parquet stands"),
                          ("none", "both eval and test")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / name))
    (tmp_path / "none" / "eval").rename(tmp_path / "none" / ".eval")
    with pytest.raises(ValueError, match="has the splits test, val, expected train among them"):
        load(str(tmp_path / "none"))


def test_labels_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 of .* has no label"):
        read_parquet(table_of(tmp_path / "t.parquet", ["cat", " ", "dog"]))


def test_paths_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path / "s"))
    for name, message in (("nowhere/", "there is no folder nowhere"), ("./a/0.png", "is no folder"),
                          ("hf:../..", "owner/name"), ("hf:s/..", "owner/name"), ("hf:a/0.png", "is a path here")):  # fmt: skip
        with pytest.raises(DataNotFound, match=message):
            load(name)
