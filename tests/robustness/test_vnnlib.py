"""VNN-LIB and ONNX, read and written."""

from __future__ import annotations

import builtins
import time

import numpy as np
import pytest
import torch
from torch import nn

from tests.robustness.test_bounds import convolutional, inputs, small
from torchfolio.errors import TorchfolioError
from torchfolio.robustness.onnx_file import read_onnx, write_onnx
from torchfolio.robustness.properties import Box, Property, classification
from torchfolio.robustness.vnnlib import FormatError, read_vnnlib, write_vnnlib

HEAD = "\n".join(f"(declare-const {n} Real)" for n in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"))
BOX = "(assert (>= X_0 -1)) (assert (<= X_0 0.5)) (assert (and (>= X_1 0) (<= X_1 1e-1)))"


def read(tmp_path, text, head=HEAD):
    path = tmp_path / "p.vnnlib"
    path.write_text(f"; a comment\n{head}\n{text}")
    return read_vnnlib(path)


def test_boxes_and_disjunctions_are_read(tmp_path):
    ((box, prop),) = read(
        tmp_path, BOX + "(assert (or (and (>= Y_1 Y_0)) (and (<= Y_2 3) (<= Y_0 (+ Y_1 (* 2 Y_2))))))"
    )
    assert box.lower.tolist() == [[-1, 0]]
    assert box.upper.tolist() == [[0.5, 0.1]]
    assert prop.C.tolist() == [[1, -1, 0], [0, 0, 1], [1, -1, -2]]
    assert prop.t.tolist() == [0, 3, 0]
    assert prop.groups.tolist() == [0, 1, 1]
    z = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 2.0], [1.0, 0.0, 0.0], [9.0, 0.0, 2.0]]).double()
    assert prop.violated(z).tolist() == [True, True, False, False]


def test_inputs_may_be_in_one_of_several_boxes(tmp_path):
    text = (
        "(assert (or (and (>= X_0 0) (<= X_0 1)) (and (>= X_0 2) (<= X_0 3)))) (assert (>= X_1 0)) (assert (<= X_1 1))"
    )
    pairs = read(tmp_path, text + "(assert (<= Y_0 Y_1))")
    assert [box.lower.tolist() for box, _ in pairs] == [[[0, 0]], [[2, 0]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(assert (>= X_0 0))", "X_0 has no"),
        (BOX, "assertions on outputs"),
        (BOX + "(assert (<= X_0 Y_0))", "single inputs"),
        (BOX + "(assert (= Y_0 1))", "'='"),
        (BOX + "(assert (<= Y_0 Z))", "'Z'"),
        (BOX + "(assert (<= Y_0 1)", "not closed"),
        (BOX + ")", "closes nothing"),
        ("(check-sat)", "check-sat"),
    ],
)
def test_what_is_not_understood_is_told(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        read(tmp_path, text)


Y = "(assert (<= Y_0 Y_1))"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(assert (<= Y_0 nan))", "line 8: expected a finite number .* 'nan'"),
        ("(assert (<= Y_0 inf))", "line 8: .* 'inf'"),
        ("(assert (<= Y_0 1e999))", "line 8: .* '1e999'"),
        ("(assert (<= Y_0 1_000))", "line 8: .* '1_000'"),
        ("(assert (<= (* 1e300 (* 1e300 Y_0)) 1))", "line 8: its numbers overflow"),
        ("(assert)", r"line 8: .* got \(assert\)"),
        ("(assert ())", r"line 8: expected a formula, got \(\)"),
        ("(assert (or))", r"line 8: expected a formula, got \(or\)"),
        ("(assert (or (and) (<= Y_0 1)))", r"line 8: expected a formula, got \(and\)"),
        ("(assert (<= Y_0 ()))", "line 8: expected a linear term"),
        ("(assert (<= Y_0 (+)))", "line 8: expected a linear term"),
        ("(assert (<= Y_0 1) (<= Y_0 2))", "line 8: expected"),
        ("(assert (<= Y_7 1))", "line 8: Y_7 is not declared"),
        ("(declare-const)", r"line 8: .* got \(declare-const\)"),
        ("(declare-const X_0 Real)", "line 8: X_0 is declared twice"),
        ("(declare-const Z Real)", "line 8: expected"),
        ("(declare-const X_5 Real)", "X_0 to X_2, without gaps"),
        ("()", "line 8: expected"),
        ("(" * 100_000, "line 8: expected at most 64 parentheses"),
        ("(assert " + "(or " * 3000 + "(<= Y_0 1)" + ")" * 3001, "line 8: expected at most 64"),
        ("(assert (or (<= Y_0 1) (>= Y_0 2)))" * 30, "at most 65536 cases"),
        ("(assert (and " + "(or (<= Y_0 1) (>= Y_0 2))" * 60 + "))", "line 8: expected at most 65536 cases"),
        ("(assert (>= X_0 3))", "no input lies"),
    ],
)
def test_what_is_wrong_is_told_by_its_line_at_once(tmp_path, text, message):
    started = time.perf_counter()
    with pytest.raises(FormatError, match=message) as caught:
        read(tmp_path, f"{BOX}\n; more\n{text}\n{Y}", head=HEAD.replace("\n", " ") + "\n\n\n")
    assert time.perf_counter() - started < 1
    assert len(str(caught.value)) < 400


def test_cases_without_inputs_are_left_out(tmp_path):
    text = BOX + "(assert (or (and (>= X_0 2) (<= Y_0 5)) (and (>= X_0 0) (<= Y_0 6))))"
    ((box, prop),) = read(tmp_path, text)
    assert box.lower.tolist() == [[0, 0]]
    assert prop.t.tolist() == [6]


def test_files_that_are_no_text_and_shapes_that_do_not_fit(tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "b", "no text"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(FormatError, match=message):
            read_vnnlib(path)
    (tmp_path / "p").write_text(HEAD + BOX + Y)
    with pytest.raises(FormatError, match="expected 12 inputs, as the network"):
        read_vnnlib(tmp_path / "p", (3, 4))


def test_bounds_that_are_divided_lose_no_input(tmp_path):
    head = "(declare-const X_0 Real)(declare-const Y_0 Real)"
    ((box, _),) = read(tmp_path, "(assert (<= (* 3 X_0) 1))(assert (>= X_0 (- 1)))(assert (<= Y_0 0))", head=head)
    assert 3 * box.upper.item() >= 1
    assert box.upper.item() - 1 / 3 < 1e-15


def test_written_properties_are_read_back(tmp_path):
    x = inputs((2,), 1) - 0.5
    box = Box(x - 1e-9, x + 1e-9)
    prop = Property(torch.tensor([[1.0, -1, 0], [0, -1, 0], [0.5, 2, 0]]).double(), torch.tensor([0.0, 2, 1]).double(), torch.tensor([0, 1, 1]))  # fmt: skip
    ((again, read_prop),) = read_vnnlib(write_vnnlib(tmp_path / "p.vnnlib", box, prop, "mine"))
    assert (again.lower < box.lower).all()
    assert (again.upper > box.upper).all()
    assert again.contains(x).all()
    assert torch.equal(read_prop.C, prop.C)
    assert torch.equal(read_prop.t, prop.t)
    assert torch.equal(read_prop.groups, prop.groups)
    ((_, plain),) = read_vnnlib(write_vnnlib(tmp_path / "q.vnnlib", box, classification(1, 3)))
    assert torch.equal(plain.C, classification(1, 3).C)
    assert "(>= Y_0 Y_1)" in (tmp_path / "q.vnnlib").read_text()


@pytest.mark.parametrize("name", ["relu", "tanh", "sigmoid", "conv"])
def test_networks_come_back_the_same(tmp_path, name):
    runtime = pytest.importorskip("onnxruntime")
    kinds = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
    net, shape = (convolutional(), (2, 6, 6)) if name == "conv" else (small(kinds[name]), (4,))
    net = net.float().eval()
    path = write_onnx(net, tmp_path / "net.onnx", shape)
    x = inputs(shape, 1).float()
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (ran,) = session.run(None, {"X": x.numpy()})
    again, read_shape = read_onnx(path)
    assert read_shape == shape
    with torch.no_grad():
        np.testing.assert_allclose(ran, net(x).numpy(), atol=1e-5)
        torch.testing.assert_close(again(x), net(x), atol=1e-5, rtol=0)


def test_matrix_products_with_constants_are_layers(tmp_path):
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    mean, weight, bias = rng.normal(size=(1, 3)), rng.normal(size=(3, 2)), rng.normal(size=2)
    constants = [
        onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in (("m", mean), ("w", weight), ("b", bias))
    ]
    nodes = [
        onnx.helper.make_node("Sub", ["X", "m"], ["a"]),
        onnx.helper.make_node("MatMul", ["a", "w"], ["c"]),
        onnx.helper.make_node("Add", ["c", "b"], ["Y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, 1, [1, k]) for n, k in (("X", 3), ("Y", 2))]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)), tmp_path / "n.onnx"
    )
    net, shape = read_onnx(tmp_path / "n.onnx")
    assert shape == (3,)
    x = torch.randn(4, 3)
    wanted = (x.numpy() - mean) @ weight + bias
    np.testing.assert_allclose(net(x).detach().numpy(), wanted, atol=1e-5)
    nodes.append(onnx.helper.make_node("Erf", ["Y"], ["Z"]))
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)), tmp_path / "n.onnx"
    )
    with pytest.raises(FormatError, match="Erf"):
        read_onnx(tmp_path / "n.onnx")


@pytest.mark.parametrize(
    ("operator", "attributes", "weight", "shape", "message"),
    [
        ("Conv", {"auto_pad": "SAME_UPPER"}, (2, 1, 3, 3), (1, 1, 4, 4), "auto_pad"),
        ("Conv", {"pads": [0, 0, 1, 1]}, (2, 1, 3, 3), (1, 1, 4, 4), "both sides"),
        ("AveragePool", {"kernel_shape": [2, 2], "ceil_mode": 1}, None, (1, 1, 5, 5), "ceil_mode"),
        ("MaxPool", {"kernel_shape": [2, 2], "ceil_mode": 1}, None, (1, 1, 5, 5), "ceil_mode"),
        ("MaxPool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, None, (1, 1, 5, 5), "both sides"),
        ("Gemm", {"transA": 1}, (1, 3), (1, 1), "transA"),
        ("MatMul", {}, (3, 4), (1, 3), "FITS"),
        ("MatMul", {}, (5, 4), (1, 3), "does not fit"),
        ("Softmax", {}, None, (1, 3), "Softmax"),
    ],
)
def test_what_would_be_another_network_is_refused(tmp_path, operator, attributes, weight, shape, message):
    onnx = pytest.importorskip("onnx")
    constants, names = [], ["X"]
    if weight is not None:
        constants, names = [onnx.numpy_helper.from_array(np.ones(weight, np.float32), "w")], ["X", "w"]
    node = onnx.helper.make_node(operator, names, ["Y"], **attributes)
    ends = [onnx.helper.make_tensor_value_info(n, 1, k) for n, k in (("X", shape), ("Y", None))]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "n.onnx")
    if message == "FITS":
        assert read_onnx(tmp_path / "n.onnx")[1] == (3,)
        return
    with pytest.raises(FormatError, match=message):
        read_onnx(tmp_path / "n.onnx")


def test_a_normalised_image_is_read_along_its_channels(tmp_path):
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([1.0, 2, 3]))  # pyright: ignore
    x = torch.rand(1, 3, 3, 3)
    net, _ = read_onnx(write_onnx(nn.Sequential(norm), tmp_path / "n.onnx", (3, 3, 3)))
    torch.testing.assert_close(net(x), norm(x))


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **settings):
        if name == "onnx":
            raise ImportError(name)
        return real(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(TorchfolioError, match=r"torchfolio\[verify\]"):
        write_onnx(small(), tmp_path / "n.onnx", (4,))


def test_other_layers_cannot_be_written(tmp_path):
    with pytest.raises(TypeError, match="LPPool2d"):
        write_onnx(nn.Sequential(nn.LPPool2d(2, 2)), tmp_path / "n.onnx", (1, 4, 4))
    for layer in (nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(2, divisor_override=3), nn.Flatten(1, 2)):
        with pytest.raises(TypeError, match="to write it to ONNX"):
            write_onnx(nn.Sequential(layer), tmp_path / "n.onnx", (1, 4, 4))
