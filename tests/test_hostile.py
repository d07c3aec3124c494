"""Files of strangers: every parser answers in bounded time and memory, with a result or one sentence that names the file.

Each gets good files that were cut, flipped, spliced, nested and made huge. How many of each kind a parser gets:

| parser | random (cut, flipped, spliced) | nested and huge |
| --- | --- | --- |
| VNN-LIB | 150 | 8 |
| ONNX | 150 | 6 |
| Parquet | 100 | 4 |
| image folder | 150 | 4 |
| paper's TOML | 150 | 6 |
| outcome.json | 150 | 6 |
"""

from __future__ import annotations

import io
import json
import resource
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.report.test_report import outcome
from torchfolio import catalog
from torchfolio.data.images import decode, list_folder, read_parquet
from torchfolio.errors import TorchfolioError
from torchfolio.report.page import collect, render
from torchfolio.robustness.onnx_file import read_onnx
from torchfolio.robustness.vnnlib import read_vnnlib

SECONDS, MEGABYTES = 5.0, 600
NOISE = [
    b"(",
    b")",
    b"[",
    b"{",
    b'"',
    b"nan",
    b"1e999",
    b"\x00",
    b"\xff",
    b"-1",
    b"or",
    b"99999999999999999999",
    b"null",
]


def png(size=(6, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def vnnlib() -> bytes:
    lines = [f"(declare-const {n} Real)" for n in ("X_0", "X_1", "Y_0", "Y_1")]
    lines += ["(assert (and (>= X_0 -1.5) (<= X_0 2)))", "(assert (>= X_1 0))", "(assert (<= X_1 1e-1))"]
    return "\n".join([*lines, "(assert (or (and (<= Y_0 Y_1)) (and (>= (+ Y_0 (* 2 Y_1)) 3) (<= Y_1 4))))"]).encode()


def network(shape=(1, 2, 4, 4)) -> bytes:
    helper = pytest.importorskip("onnx").helper
    from onnx import numpy_helper

    rng = np.random.default_rng(0)
    values = {"k": rng.normal(size=(2, 2, 2, 2)), "w": rng.normal(size=(18, 3)), "b": rng.normal(size=3)}
    nodes = [
        helper.make_node("Conv", ["X", "k"], ["a"], kernel_shape=[2, 2], strides=[1, 1]), helper.make_node("Relu", ["a"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]), helper.make_node("MatMul", ["d", "w"], ["e"]),
        helper.make_node("Add", ["e", "b"], ["Y"]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info("X", 1, shape), helper.make_tensor_value_info("Y", 1, [1, 3])]
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)).SerializeToString()


def table(rows=4, columns=None) -> bytes:
    buffer = io.BytesIO()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png(), "path": None}] * rows, kind)
    pq.write_table(pa.table(columns or {"image": images, "label": [k % 2 for k in range(rows)]}), buffer)
    return buffer.getvalue()


def paper() -> bytes:
    return (Path(catalog.__file__).parent.parent / "papers" / "auglocal.toml").read_bytes()


def read_images(path: Path) -> None:
    """A folder of two classes, one image of which is the file."""
    decode([path, png()], [str(path), "other"])


def read_outcome(path: Path) -> None:
    """What the report makes of a run: always a page."""
    path.rename(path.parent / "outcome.json")
    text = render(collect([path.parent]))
    assert "<img src=x" not in text


PARSERS = {
    "vnnlib": (read_vnnlib, vnnlib), "onnx": (read_onnx, network), "parquet": (read_parquet, table),
    "images": (read_images, png), "toml": (catalog.read, paper), "outcome": (read_outcome, lambda: json.dumps(outcome()).encode()),
}  # fmt: skip
COUNTS = {"vnnlib": 150, "onnx": 150, "parquet": 100, "images": 150, "toml": 150, "outcome": 150}


def judged(name: str, content: bytes, folder: Path) -> None:
    """A result or one sentence that names the file, in bounded time and memory."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "the_file"
    path.write_bytes(content)
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PARSERS[name][0](path)
    except (TorchfolioError, ValueError) as error:
        text, kind = str(error), type(error)
        assert "the_file" in text, text
        assert len(text) < 1000, text
        assert kind is ValueError or issubclass(kind, TorchfolioError), kind
        if name != "toml":
            assert "\n" not in text, text
    assert time.process_time() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


@st.composite
def spoiled(draw, good: bytes) -> bytes:
    """A good file after a few accidents, or one that is none."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["cut", "flip", "splice", "repeat", "noise", "other"]))
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        end = min(len(content), at + draw(st.integers(1, 60)))
        if kind == "cut":
            del content[at : end if draw(st.booleans()) else len(content)]
        elif kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "splice":
            content[at:end] = content[: end - at][::-1]
        elif kind == "repeat":
            content[at:at] = content[at:end] * draw(st.integers(1, 50))
        elif kind == "noise":
            content[at:at] = draw(st.sampled_from(NOISE)) * draw(st.integers(1, 5))
        elif draw(st.integers(0, 5)) == 0:
            content = bytearray(draw(st.binary(max_size=200)))
    return bytes(content)


@pytest.mark.parametrize("name", PARSERS)
def test_spoiled_files(name, tmp_path_factory):
    good = PARSERS[name][1]()
    folder = tmp_path_factory.mktemp(name)
    judged(name, good, folder / "good")
    count = 0

    @settings(
        max_examples=COUNTS[name],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(spoiled(good))
    def attempt(content):
        nonlocal count
        count += 1
        judged(name, content, folder / "run")

    attempt()
    assert count >= COUNTS[name]


def deep(opening: bytes, closing: bytes, inner: bytes = b"", depth: int = 200_000) -> bytes:
    return opening * depth + inner + closing * depth


def onnx_of(change) -> bytes:
    import onnx

    model = onnx.load_model_from_string(network())
    change(model)
    return model.SerializeToString()


def huge_png(width: int, height: int) -> bytes:
    """Few bytes that say that they are a very large image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def text_png() -> bytes:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 80_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def huge() -> list[tuple[str, str, bytes]]:
    pytest.importorskip("onnx")
    choices = b"(assert (or (<= Y_0 1) (>= Y_0 2)))"

    def external(model):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        tensor.external_data.add(key="location", value="/etc/passwd")

    labels = pa.array(np.zeros(3_000_000, np.int64))
    body = outcome()
    return [
        ("vnnlib", "30 disjunctions", vnnlib() + choices * 30),
        ("vnnlib", "16 disjunctions", vnnlib() + choices * 12),
        ("vnnlib", "one of 60", vnnlib() + b"(assert (and " + b"(or (<= Y_0 1) (>= Y_0 2))" * 60 + b"))"),
        ("vnnlib", "deep", vnnlib() + deep(b"(", b")")),
        ("vnnlib", "deep formula", vnnlib() + b"(assert " + deep(b"(and ", b")", b"(<= Y_0 1)") + b")"),
        ("vnnlib", "deep term", vnnlib() + b"(assert (<= Y_0 " + deep(b"(+ 1 ", b")", b"Y_1") + b"))"),
        ("vnnlib", "long number", vnnlib() + b"(assert (<= Y_0 " + b"9" * 1_000_000 + b"))"),
        ("vnnlib", "large index", vnnlib() + b"(declare-const X_999999999 Real)"),
        ("onnx", "deep", b"\x3a\x80\x01" * 50_000),
        ("onnx", "large input", network((1, 2, 2**30, 2**30))),
        ("onnx", "large batch", network((2**40, 2, 4, 4))),
        ("onnx", "large constant", onnx_of(lambda m: m.graph.initializer[0].dims.extend([2**30, 2**30]))),
        ("onnx", "large padding", onnx_of(lambda m: m.graph.node[0].attribute.add(name="pads", type=7, ints=[2**24] * 4))),
        ("onnx", "external", onnx_of(external)),
        ("parquet", "no rows", table(0)),
        ("parquet", "many rows", table(columns={"image": labels, "label": labels})),
        ("parquet", "deep", table(columns={"image": [[[[[[1]]]]]], "label": [0]})),
        ("parquet", "text", table(columns={"image": ["x"], "label": ["y" * 1_000_000]})),
        ("images", "many pixels", huge_png(2**30, 2**30)),
        ("images", "some pixels", huge_png(12_000, 12_000)),
        ("images", "long text", text_png()),
        ("images", "script", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run"),
        ("toml", "deep arrays", b"a = " + deep(b"[", b"]")),
        ("toml", "deep tables", b"a = " + deep(b"{a=", b"}", b"1")),
        ("toml", "deep names", b"a" + b".a" * 2000 + b" = 1"),
        ("toml", "long number", b"year = " + b"9" * 1_000_000),
        ("toml", "deep condition", paper().replace(b"holds = \"", b"holds = \"" + b"(" * 5000, 1)),
        ("toml", "long condition", paper().replace(b"holds = \"", b"holds = \"" + b"1+" * 50_000, 1)),
        ("outcome", "deep", b"[" * 200_000),
        ("outcome", "deep settings", json.dumps(body).encode().replace(b'"epochs": 3', b'"a": ' + deep(b"[", b"]", b"", 900), 1)),
        ("outcome", "deeper settings", json.dumps(body).encode().replace(b'"epochs": 3', b'"a": ' + deep(b'{"a":', b"}", b"1", 20_000), 1)),
        ("outcome", "long number", json.dumps(body).encode().replace(b"12.5", b"9" * 4000, 1)),
        ("outcome", "many seeds", json.dumps(body | {"seeds": [0] * 300_000}).encode()),
        ("outcome", "too long", b" " * 2**24 + json.dumps(body).encode()),
    ]  # fmt: skip


def test_nested_and_huge_files(tmp_path):
    cases = huge()
    for k, (name, what, content) in enumerate(cases):
        try:
            judged(name, content, tmp_path / str(k))
        except BaseException as error:
            error.add_note(f"{name}: {what}")
            raise
    table = {name: sum(n == name for n, _, _ in cases) for name in PARSERS}
    assert table == {"vnnlib": 8, "onnx": 6, "parquet": 4, "images": 4, "toml": 6, "outcome": 6}
    for name, count in table.items():
        assert any(f"| {COUNTS[name]} | {count} |" in line for line in (__doc__ or "").splitlines()), name


def test_a_folder_of_links_ends(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png())
        (tmp_path / name / "loop").symlink_to(tmp_path)
        (tmp_path / name / "x.png").symlink_to(tmp_path / name / "x.png")
    paths, _, _ = list_folder(tmp_path)
    assert len(paths) == 2
