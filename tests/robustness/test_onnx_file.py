"""ONNX files of others: what is read computes what onnxruntime does, and the rest is refused in one sentence."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from torchfolio.robustness.bounds import ElementwiseAffine, Residual, crown
from torchfolio.robustness.onnx_file import read_onnx, write_onnx
from torchfolio.robustness.properties import Box, Property
from torchfolio.robustness.verifiers import CrownSplit, Interval, milp_verify
from torchfolio.robustness.vnnlib import FormatError

onnx = pytest.importorskip("onnx")
FLOAT, DOUBLE = 1, 11


def saved(path, nodes, constants, shape, output=None, kind=FLOAT, opset=13):
    """A file of nodes given as (operator, inputs, output, attributes)."""
    made = [onnx.helper.make_node(op, inputs, [out], **attributes) for op, inputs, out, attributes in nodes]
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    ends = [onnx.helper.make_tensor_value_info("X", kind, shape)]
    ends.append(onnx.helper.make_tensor_value_info(output or nodes[-1][2], kind, None))
    graph = onnx.helper.make_graph(made, "g", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def ran(path, x):
    """What onnxruntime makes of it; `None` where it refuses."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return session.run(None, {"X": x})[0]
    except Exception:
        return None


def test_no_verdict_where_a_counterexample_exists(tmp_path):
    pytest.importorskip("onnxruntime")
    # The bias goes along the rows, not along the columns.
    constants = {
        "I": np.eye(3, dtype=np.float32), "b": np.float32([[0], [5], [9]]),
        "w": np.concatenate([np.eye(9)[1:2], np.eye(9)[3:4]]).T.astype(np.float32),
    }  # fmt: skip
    nodes = [
        ("MatMul", ["X", "I"], "a", {}), ("Add", ["a", "b"], "c", {}), ("Flatten", ["c"], "d", {}),
        ("MatMul", ["d", "w"], "Y", {}),
    ]  # fmt: skip
    net, shape = read_onnx(saved(tmp_path / "n.onnx", nodes, constants, [1, 3, 3]))
    x = np.random.default_rng(0).random((1, 3, 3), dtype=np.float32)
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach().numpy(), ran(tmp_path / "n.onnx", x), atol=1e-6)
    box = Box(torch.zeros(1, *shape).double(), torch.ones(1, *shape).double())
    prop = Property.rows(torch.tensor([[1.0, -1.0]]).double())  # Y_0 > Y_1: never, Y_1 is at least 5 - 1 above
    for verdict in (
        Interval().decide(net, box, prop),
        CrownSplit().decide(net, box, prop),
        milp_verify(net, box, prop),
    ):
        assert verdict.status == "falsified"


class Draw:
    """A random small graph: some fit ONNX, some do not."""

    def __init__(self, seed: int) -> None:
        self.rng, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.type = self.rng.choice([np.float32, np.float32, np.float64])
        self.shape = self.rng.choice([(3,), (4,), (3, 3), (2, 4, 4), (1, 1, 5), (2, 1)])
        self.nodes, self.constants, self.current, self.count = [], {}, "X", 0
        self.x = np.zeros((1, *self.shape), self.type)

    def name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def constant(self, value) -> str:
        """A constant, in one of the ways in which a file can give it."""
        value = np.asarray(value, self.type)
        name, way = self.name(), self.rng.randrange(8)
        if way == 0 and value.ndim:
            perm = self.rng.sample(range(value.ndim), value.ndim)
            self.constants[name + "i"] = value.transpose(np.argsort(perm)).copy()
            self.nodes.append(("Transpose", [name + "i"], name, {"perm": perm}))
        elif way == 1:
            self.constants[name + "i"] = value.astype(np.float64)
            to = FLOAT if self.type == np.float32 else DOUBLE
            self.nodes.append(("Cast", [name + "i"], name, {"to": to}))
        elif way == 2:
            self.constants |= {name + "i": value.reshape(-1), name + "s": np.array(value.shape, np.int64)}
            self.nodes.append(("Reshape", [name + "i", name + "s"], name, {}))
        elif way == 3 and value.ndim and 1 in value.shape:
            axis = value.shape.index(1)
            self.constants |= {name + "i": value.squeeze(axis), name + "s": np.array([axis], np.int64)}
            self.nodes.append(("Unsqueeze", [name + "i", name + "s"], name, {}))
        elif way == 4 and self.type == np.float32 and not value.ndim:
            self.nodes.append(("Constant", [], name, {"value_float": float(value)}))
        elif way == 5:
            self.nodes.append(("Constant", [], name, {"value": onnx.numpy_helper.from_array(value)}))
        elif way == 6:
            self.constants |= {name + "i": value, name + "j": np.asarray(self.numbers.normal(), self.type)}
            self.nodes.append((self.rng.choice(["Add", "Mul", "Sub"]), [name + "i", name + "j"], name, {}))
        else:
            self.constants[name] = value
        return name

    def normal(self, *shape: int):
        return self.numbers.normal(size=shape)

    def shaped(self):
        """A shape that sometimes broadcasts over the network's values."""
        shape = [self.rng.choice([1, size, size]) for size in self.x.shape]
        shape = shape[self.rng.randint(0, len(shape)) :]
        if self.rng.random() < 0.1:
            shape = [*shape, self.rng.choice([1, 2, 3])]
        return shape

    def step(self) -> None:
        kind = self.rng.choice(["Add", "Sub", "Mul", "Div", "MatMul", "MatMul", "Gemm", "Relu", "Flatten", "Reshape", "Conv", "AveragePool", "MaxPool", "BatchNormalization", "Neg", "Identity", "Tanh"])  # fmt: skip
        x, inputs, attributes = self.x, [self.current], {}
        if kind in ("AveragePool", "MaxPool", "Conv") and self.type == np.float64:
            kind = "Relu"  # onnxruntime has neither of doubles on every machine
        if kind in ("Add", "Sub", "Mul", "Div"):
            inputs.append(self.constant(self.normal(*self.shaped())))
            if self.rng.random() < 0.3:
                inputs.reverse()
        elif kind == "MatMul":
            inputs.append(self.constant(self.normal(x.shape[-1], self.rng.randint(1, 4))))
        elif kind == "Gemm":
            width, trans = self.rng.randint(1, 4), self.rng.randint(0, 1)
            inputs.append(self.constant(self.normal(*((width, x.shape[-1]) if trans else (x.shape[-1], width)))))
            if self.rng.random() < 0.7:
                inputs.append(
                    self.constant(self.normal(*self.rng.choice([(width,), (1, width), (1,), (), (width, 1)])))
                )
            attributes = {"transB": trans, "alpha": self.rng.choice([1.0, 0.5]), "beta": self.rng.choice([1.0, 2.0])}
        elif kind == "Reshape":
            name = self.name()
            self.constants[name] = np.array(
                self.rng.choice([[1, -1], [0, -1], [-1], [-1, x[0].size], [-1, 2]]), np.int64
            )
            inputs.append(name)
        elif kind == "Conv":
            group = self.rng.choice([1, 1, 2])
            inputs.append(self.constant(self.normal(2, max(1, x.shape[1] // group), 2, 2)))
            if self.rng.random() < 0.5:
                inputs.append(self.constant(self.normal(2)))
            attributes = {
                "group": group,
                "pads": [1, 0, 1, 0],
                "strides": [1, 2],
                "dilations": [self.rng.randint(1, 2), 1],
            }
        elif kind == "AveragePool":
            attributes = {"kernel_shape": [2, 2], "pads": self.rng.choice([[0] * 4, [1] * 4]), "count_include_pad": self.rng.randint(0, 1)}  # fmt: skip
        elif kind == "MaxPool":
            attributes = {"kernel_shape": [2, 3], "strides": [1, 2], "pads": self.rng.choice([[0] * 4, [1] * 4]), "dilations": [self.rng.randint(1, 2), 1]}  # fmt: skip
        elif kind == "BatchNormalization":
            inputs += [self.constant(v) for v in (*self.normal(3, x.shape[1]), self.normal(x.shape[1]) ** 2)]
        self.current, self.nodes = (
            f"t{len(self.nodes)}",
            [*self.nodes, (kind, inputs, f"t{len(self.nodes)}", attributes)],
        )


def test_random_graphs_compute_what_onnxruntime_does(tmp_path):
    pytest.importorskip("onnxruntime")
    read, refused = 0, 0
    for seed in range(250):
        draw = Draw(seed)
        kind, shape = FLOAT if draw.type == np.float32 else DOUBLE, [1, *draw.shape]
        x = draw.numbers.normal(size=shape).astype(draw.type)
        draw.x, wanted = x, None
        for _ in range(draw.rng.randint(1, 4)):
            before = list(draw.nodes), dict(draw.constants), draw.current
            draw.step()
            path = saved(tmp_path / "n.onnx", draw.nodes, draw.constants, shape, draw.current, kind)
            result = ran(path, x)
            try:
                net, read_shape = read_onnx(path)
            except FormatError:
                refused += 1
                draw.nodes, draw.constants, draw.current = before
                continue
            read += 1
            assert result is not None, (seed, draw.nodes)
            wanted = result
            assert read_shape == draw.shape
            values = net(torch.from_numpy(x)).detach().numpy()
            assert values.dtype == draw.type
            assert values.shape == wanted.shape, (seed, draw.nodes)
            tolerance = 1e-4 if draw.type == np.float32 else 1e-11
            np.testing.assert_allclose(values, wanted, rtol=tolerance, atol=tolerance * (1 + np.abs(wanted).max()))
            # Examples of a batch do not meet: row by row it is the same.
            pair = net(torch.from_numpy(np.concatenate([x + 1, x]))).detach().numpy()
            np.testing.assert_allclose(pair[1:], values, rtol=tolerance, atol=tolerance * (1 + np.abs(wanted).max()))
            draw.x = wanted
    assert read > 250, (read, refused)
    assert refused > 50, (read, refused)


def test_max_pools_are_written_read_and_verified(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 3), (1, 2), (1, 1)), nn.MaxPool2d(2, 1, dilation=2),
        nn.Flatten(), nn.Linear(30, 3),
    ).eval()  # fmt: skip
    path = write_onnx(net, tmp_path / "n.onnx", (1, 6, 9))
    again, shape = read_onnx(path)
    x = torch.rand(1, *shape)
    assert torch.equal(again(x), net(x))
    found = ran(path, x.numpy())
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)
    label = int(net(x).argmax())
    assert CrownSplit(max_boxes=4).verify(again, x[0] - 1e-4, x[0] + 1e-4, label).status == "verified"
    with pytest.raises(TypeError, match="ceil_mode"):
        write_onnx(nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), tmp_path / "n.onnx", (1, 4, 4))


def test_doubles_stay_doubles(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    again, _ = read_onnx(write_onnx(net, tmp_path / "n.onnx", (3,)))
    x = torch.randn(5, 3).double()
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=1e-15)
    assert torch.equal(again[0].weight, net[0].weight)


W = np.ones((3, 2), np.float32)
BIG = np.float32([[1, np.inf, 1], [1, 1, 1]]).T


@pytest.mark.parametrize(
    ("nodes", "constants", "shape", "message"),
    [
        ([("MatMul", ["X", "w"], "Y", {})], {"w": W}, [2, 3], "a batch of 1 or of any size, got 2"),
        ([("MatMul", ["X", "w"], "Y", {})], {"w": W}, [3], "a batch axis"),
        ([("MatMul", ["X", "w"], "Y", {})], {"w": W.astype(np.float64)}, [1, 3], "node 0 .* of float32"),
        ([("MatMul", ["X", "w"], "Y", {})], {"w": BIG}, [1, 3], "'w' holds NaN or infinity"),
        ([("Constant", [], "c", {"value_float": float("nan")}), ("Add", ["X", "c"], "Y", {})], {}, [1, 3], "finite number for value_float, got nan"),
        ([("Div", ["X", "z"], "Y", {})], {"z": np.float32(0)}, [1, 3], "infinity in float32"),
        ([("Add", ["X", "b"], "Y", {})], {"b": np.ones((2, 3), np.float32)}, [1, 3], "changes the batch axis"),
        ([("Add", ["X", "b"], "Y", {})], {"b": np.ones((1, 1, 3), np.float32)}, [1, 3], "changes the batch axis"),
        ([("Add", ["X", "b"], "Y", {})], {"b": np.ones(2, np.float32)}, [1, 3], "does not fit"),
        ([("Mul", ["X", "X"], "Y", {})], {}, [1, 3], "values once"),
        ([("Add", ["X", "z"], "Y", {})], {}, [1, 3], "reads z, which nothing"),
        ([("Relu", ["X"], "a", {}), ("Gemm", ["a", "w", "X"], "Y", {})], {"w": W}, [1, 3], "values once"),
        ([("Transpose", ["X"], "Y", {})], {}, [1, 3], "is known of constants only"),
        ([("Relu", ["X"], "w", {}), ("MatMul", ["w", "v"], "Y", {})], {"w": W, "v": W}, [1, 3], "a new name"),
        ([("Relu", ["X"], "Y", {"alpha": 1.0})], {}, [1, 3], "the attribute alpha"),
        ([("Constant", [], "c", {"value_string": b"x"}), ("Add", ["X", "c"], "Y", {})], {}, [1, 3], "value_string"),
        ([("Transpose", ["w"], "v", {"perm": [0, 0]}), ("MatMul", ["X", "v"], "Y", {})], {"w": W}, [1, 3], "does not fit"),
        ([("Add", ["a", "b"], "c", {}), ("Add", ["X", "c"], "Y", {})],
         {"a": np.ones((2**14, 1), np.float32), "b": np.ones((1, 2**14), np.float32)}, [1, 3], "more than"),
        ([("Conv", ["X", "w"], "Y", {"pads": [2**20] * 4})], {"w": np.ones((1, 1, 2, 2), np.float32)}, [1, 1, 4, 4], "expected 1 to"),
        ([("Conv", ["X", "w"], "Y", {"group": 0})], {"w": np.ones((1, 1, 2, 2), np.float32)}, [1, 1, 4, 4], "group 0"),
        ([("AveragePool", ["X"], "Y", {})], {}, [1, 1, 4, 4], "expected kernel_shape"),
        ([("MaxPool", ["X"], "Y", {"kernel_shape": [1, 2], "pads": [0, 1, 0, 1], "dilations": [1, 4]})], {}, [1, 1, 3, 3], "but their padding"),
        ([("Relu", ["X"], "Y", {})], {}, [1, 2**40], "more than"),
        ([("Concat", ["X", "X"], "Y", {"axis": 1})], {}, [1, 3], "values once"),
        ([("Gather", ["X", "i"], "Y", {"axis": 1})], {"i": np.array([0])}, [1, 3], "is known of constants only"),
        ([("Gather", ["w", "i"], "v", {}), ("MatMul", ["X", "v"], "Y", {})], {"w": W, "i": np.array([3])}, [1, 3], "does not fit"),
        ([("Gather", ["w", "i"], "v", {}), ("MatMul", ["X", "v"], "Y", {})], {"w": np.ones((3, 2**13), np.float32), "i": np.zeros(2**14, np.int32)}, [1, 3], "more than"),
        ([("Concat", ["w", "z"], "v", {"axis": 0}), ("MatMul", ["X", "v"], "Y", {})], {"w": W, "z": np.ones((1, 2))}, [1, 3], "of one type"),
        ([("Concat", ["w", "w"], "v", {"axis": 5}), ("MatMul", ["X", "v"], "Y", {})], {"w": W}, [1, 3], "does not fit"),
        ([("Sqrt", ["w"], "v", {}), ("MatMul", ["X", "v"], "Y", {})], {"w": -W}, [1, 3], "NaN or infinity"),
        ([("Erf", ["X"], "Y", {})], {}, [1, 3], "operator Erf is not known"),
    ],
)  # fmt: skip
def test_what_would_be_another_network_is_refused_by_name(tmp_path, nodes, constants, shape, message):
    started = time.perf_counter()
    with pytest.raises(FormatError, match=message) as caught:
        read_onnx(saved(tmp_path / "n.onnx", nodes, constants, shape))
    assert time.perf_counter() - started < 2
    assert "n.onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [b"result", b"weight", b"MatMul"])
def test_names_that_are_no_text_are_refused(tmp_path, name):
    path = saved(tmp_path / "n.onnx", [("MatMul", ["X", "weight"], "result", {})], {"weight": W}, [1, 3])
    assert read_onnx(path)[1] == (3,)
    path.write_bytes(path.read_bytes().replace(name, b"\xff" + name[1:]))
    with pytest.raises(FormatError, match="UTF-8"):
        read_onnx(path)


def test_numbers_in_other_files_are_not_read(tmp_path):
    path = saved(tmp_path / "n.onnx", [("MatMul", ["X", "w"], "Y", {})], {"w": W}, [1, 3])
    model = onnx.load(str(path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="another file"):
        read_onnx(path)


def test_a_constant_that_repeats_the_values_is_bounded(tmp_path):
    path = saved(tmp_path / "n.onnx", [("Add", ["X", "b"], "c", {}), ("Flatten", ["c"], "Y", {})], {"b": np.zeros((3, 4), np.float32)}, [1, 3, 1])  # fmt: skip
    net, shape = read_onnx(path)
    assert isinstance(net[0], ElementwiseAffine)
    box = Box(torch.zeros(1, *shape).double(), torch.ones(1, *shape).double())
    prop = Property.rows(torch.eye(12).double(), -0.5)
    for verifier in (Interval(), CrownSplit()):
        assert verifier.decide(net, box, prop).status == "verified"
    assert milp_verify(net, box, prop).status == "verified"


def test_operators_are_followed_in_every_form(tmp_path):
    # Squeeze, Neg, Identity and value_ints of constants, none of which the random graphs draw.
    nodes = [
        ("Constant", [], "axes", {"value_ints": [0]}), ("Squeeze", ["w", "axes"], "v", {}), ("Neg", ["v"], "m", {}),
        ("Identity", ["m"], "k", {}), ("MatMul", ["X", "k"], "Y", {}),
    ]  # fmt: skip
    weight = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    path = saved(tmp_path / "n.onnx", nodes, {"w": weight}, ["batch", 3])
    net, _ = read_onnx(path)
    x = np.float32([[1, 2, 3]])
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach().numpy(), -x @ weight[0])


def test_shapes_and_parts_of_constants_are_folded(tmp_path):
    """A flattening as torch's older exports write it, weights in parts, and a product with a root."""
    nodes = [
        ("Shape", ["X"], "sizes", {}), ("Gather", ["sizes", "first"], "count", {"axis": 0}),
        ("Unsqueeze", ["count", "axis"], "row", {}), ("Concat", ["row", "rest"], "target", {"axis": 0}),
        ("Reshape", ["X", "target"], "flat", {}), ("Concat", ["w", "v"], "all", {"axis": -1}),
        ("Gather", ["all", "order"], "turned", {"axis": 1}), ("MatMul", ["flat", "turned"], "product", {}),
        ("Sqrt", ["c"], "root", {}), ("Mul", ["product", "root"], "Y", {}),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    constants = {
        "first": np.array(0), "axis": np.array([0]), "rest": np.array([-1]), "order": np.array([3, -5, 1]),
        "w": rng.normal(size=(6, 2)).astype(np.float32), "v": rng.normal(size=(6, 3)).astype(np.float32), "c": np.float32([4, 9, 2]),
    }  # fmt: skip
    path = saved(tmp_path / "n.onnx", nodes, constants, [1, 2, 3])
    net, shape = read_onnx(path)
    assert shape == (2, 3)
    x = rng.random((1, 2, 3), dtype=np.float32)
    expected = (
        x.reshape(1, 6) @ np.concatenate([constants["w"], constants["v"]], 1)[:, [3, 0, 1]] * np.float32([2, 3, 2**0.5])
    )
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach().numpy(), ran(path, x), rtol=1e-5)


def affine(inputs, weight, out):
    return ("Gemm", [inputs, weight, "b"], out, {})


PATHS = {
    "residual block": [affine("X", "w", "h"), ("Relu", ["h"], "r", {}), affine("r", "v", "k"), ("Add", ["k", "X"], "s", {}),
                       ("Relu", ["s"], "Y", {})],
    "projected shortcut": [affine("X", "w", "h"), ("Relu", ["h"], "r", {}), affine("r", "v", "k"), affine("X", "u", "p"),
                           ("Add", ["p", "k"], "s", {}), affine("s", "w", "Y")],
    "block in a block": [affine("X", "w", "h"), ("Relu", ["h"], "r", {}), affine("r", "v", "k"), ("Add", ["k", "h"], "s", {}),
                         ("Relu", ["s"], "t", {}), affine("t", "u", "l"), ("Add", ["l", "X"], "Y", {})],
    "crossing": [affine("X", "w", "h"), ("Relu", ["h"], "r", {}), affine("r", "v", "k"), ("Relu", ["k"], "l", {}),
                 ("Add", ["l", "h"], "m", {}), ("Add", ["m", "r"], "o", {}), affine("o", "u", "Y")],
    "difference": [affine("X", "w", "h"), ("Relu", ["h"], "r", {}), ("Sub", ["X", "r"], "Y", {})],
    "doubled": [affine("X", "w", "h"), ("Add", ["h", "h"], "d", {}), ("Relu", ["d"], "Y", {})],
    "bias of one of two readers": [("MatMul", ["X", "w"], "h", {}), ("Add", ["h", "b"], "c", {}), ("Relu", ["c"], "r", {}),
                                   ("Add", ["r", "h"], "Y", {})],
    "unused values": [("Relu", ["X"], "z", {}), affine("X", "w", "Y")],
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_meet(name, tmp_path):
    rng = np.random.default_rng(0)
    constants = {n: rng.normal(size=(4, 4)).astype(np.float32) for n in "wvu"} | {
        "b": rng.normal(size=4).astype(np.float32)
    }
    net, shape = read_onnx(saved(tmp_path / "n.onnx", PATHS[name], constants, [1, 4]))
    x = torch.randn(50, *shape, generator=torch.Generator().manual_seed(0))
    want = np.concatenate([ran(tmp_path / "n.onnx", row[None].numpy()) for row in x])
    torch.testing.assert_close(net(x).detach(), torch.from_numpy(want), rtol=1e-5, atol=1e-5)
    # Bounds hold of what onnxruntime computes, and the network is written as it was read.
    box = Box(x.amin(0, keepdim=True), x.amax(0, keepdim=True))
    identity = Property.rows(torch.cat([torch.eye(4), -torch.eye(4)]))
    lower = crown(net, box, identity, rounding=1e-5).lower[0].detach().numpy()
    assert (np.concatenate([want, -want], 1) >= lower).all()
    again, _ = read_onnx(write_onnx(net, tmp_path / "again.onnx", shape))
    torch.testing.assert_close(again(x), net(x))


def test_residual_images_and_reshapes(tmp_path):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))
    net = nn.Sequential(Residual(body), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    x = torch.randn(1, 2, 5, 5)
    path = write_onnx(net, tmp_path / "n.onnx", (2, 5, 5))
    np.testing.assert_allclose(ran(path, x.numpy()), net(x).detach().numpy(), atol=1e-6)
    torch.testing.assert_close(read_onnx(path)[0](x), net(x))
    nodes = [("Reshape", ["X", "s"], "a", {}), ("Conv", ["a", "k"], "c", {}), ("Reshape", ["c", "t"], "Y", {})]
    constants = {"s": np.array([-1, 1, 4, 4]), "k": np.ones((2, 1, 3, 3), np.float32), "t": np.array([0, 4, -1, 1])}
    path = saved(tmp_path / "r.onnx", nodes, constants, [1, 16])
    net, x = read_onnx(path)[0], np.random.default_rng(0).random((1, 16), dtype=np.float32)
    np.testing.assert_allclose(net(torch.from_numpy(x)).detach().numpy(), ran(path, x), atol=1e-6)


def test_sums_that_are_not_followed(tmp_path):
    square = {"w": np.eye(4, dtype=np.float32), "b": np.zeros(4, np.float32)}
    product = [affine("X", "w", "h"), ("Mul", ["h", "X"], "Y", {})]
    with pytest.raises(FormatError, match="node 1 \\(Mul\\): expected to read the network's values once"):
        read_onnx(saved(tmp_path / "n.onnx", product, square, [1, 4]))
    wide = [("MatMul", ["X", "v"], "h", {}), ("Add", ["h", "X"], "Y", {})]
    with pytest.raises(FormatError, match=r"two paths of one shape, got \(1, 5\) and \(1, 4\)"):
        read_onnx(saved(tmp_path / "n.onnx", wide, {"v": np.ones((4, 5), np.float32)}, [1, 4]))
    deep = [("Add", ["X" if k == 0 else f"y{k - 1}", "X"], f"y{k}", {}) for k in range(3000)]
    with pytest.raises(FormatError, match=r"within each other|cross so often"):
        read_onnx(saved(tmp_path / "n.onnx", deep, {}, [1, 4]))
    crossing = [part for k in range(40) for part in (
        ("Relu", [f"y{k}"], f"a{k}", {}), ("Add", [f"a{k}", f"y{k}"], f"m{k}", {}), ("Add", [f"m{k}", f"a{k}"], f"y{k + 1}", {}),
    )]  # fmt: skip
    crossing = [("Identity", ["X"], "y0", {}), *crossing]
    started = time.perf_counter()
    net, _ = read_onnx(saved(tmp_path / "n.onnx", crossing, {}, [1, 4]))
    assert time.perf_counter() - started < 5
    np.testing.assert_allclose(net(torch.ones(1, 4)).numpy(), ran(tmp_path / "n.onnx", np.ones((1, 4), np.float32)))
