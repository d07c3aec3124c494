"""Verification problems as files: VNN-LIB properties and ONNX networks, in and out.

VNN-LIB is read as VNN-COMP writes it: real constants `X_i` and `Y_j`, and assertions of `<=` and `>=` between them and
numbers, in conjunctions and disjunctions. ONNX networks become `nn.Sequential`s of layers whose bounds are known. Needs
the extra `verify` for ONNX.

Reference: Demarchi et al., "Supporting Standardization of Neural Networks Verification with VNNLIB and CoCoNet", 2023.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.errors import TorchfolioError
from torchfolio.robustness.bounds import AFFINE, ElementwiseAffine, _flat, _is
from torchfolio.robustness.properties import Box, Property

__all__ = ["read_onnx", "read_vnnlib", "write_onnx", "write_vnnlib"]

Atom = tuple[dict[str, float], float]  # sum of coefficients times constants <= bound
Tree = str | list["Tree"]


class FormatError(TorchfolioError, ValueError):
    """A file that is not what it should be."""


def read_vnnlib(path: str | Path, shape: Sequence[int] | None = None) -> list[tuple[Box, Property]]:
    """Read a property: boxes of inputs, and what would violate it on each.

    Args:
        path: of the file.
        shape: of one input, which the constants `X_0, X_1, …` fill in order; flat by default.

    Returns:
        Pairs of a box and a property, float64. The whole is violated if any pair is.

    Raises:
        FormatError: if the file is not of this kind, an input has no bounds, or an assertion mixes inputs and outputs.
    """
    text = re.sub(r";[^\n]*", "", Path(path).read_text())
    inputs, outputs, conjuncts = 0, 0, []
    for form in _parse(text, path):
        head = form[0] if isinstance(form, list) and form else None
        if head == "declare-const":
            name = str(form[1])
            inputs, outputs = inputs + name.startswith("X_"), outputs + name.startswith("Y_")
        elif head == "assert":
            conjuncts.append(_dnf(form[1], path))
        else:
            raise FormatError(f"{path}: expected declare-const or assert, got {head!r}")
    if not inputs or not outputs:
        raise FormatError(f"{path}: expected constants X_i and Y_j, got {inputs} and {outputs}")
    # Simple assertions are common; only the disjunctions multiply.
    fixed = [atom for options in conjuncts if len(options) == 1 for atom in options[0]]
    choices = [options for options in conjuncts if len(options) > 1]
    cases = [[*fixed, *itertools.chain(*picked)] for picked in itertools.product(*choices)]
    return _gathered(cases, inputs, outputs, shape, path)


def _gathered(
    cases: list[list[Atom]], inputs: int, outputs: int, shape: Sequence[int] | None, path: str | Path
) -> list[tuple[Box, Property]]:
    """Cases of the same box become one property with a group for each."""
    found: dict[tuple[float, ...], list[list[Atom]]] = {}
    for case in cases:
        low, high = [-np.inf] * inputs, [np.inf] * inputs
        rows = []
        for coefficients, bound in case:
            if all(name.startswith("Y_") for name in coefficients):
                rows.append((coefficients, bound))
                continue
            if len(coefficients) != 1:
                raise FormatError(f"{path}: expected bounds on single inputs, got one of {', '.join(coefficients)}")
            ((name, factor),) = coefficients.items()
            i = int(name[2:])
            if i >= inputs:
                raise FormatError(f"{path}: expected constants up to X_{inputs - 1}, got {name}")
            if factor > 0:
                high[i] = min(high[i], bound / factor)
            else:
                low[i] = max(low[i], bound / factor)
        open_ = [i for i in range(inputs) if not (np.isfinite(low[i]) and np.isfinite(high[i]))]
        if open_:
            raise FormatError(f"{path}: X_{open_[0]} has no lower or no upper bound")
        if not rows:
            raise FormatError(f"{path}: expected assertions on outputs, got none")
        found.setdefault((*low, *high), []).append(rows)
    pairs = []
    for ends, groups in found.items():
        low, high = (torch.tensor(part, dtype=torch.float64) for part in (ends[:inputs], ends[inputs:]))
        size = (1, *(shape or (inputs,)))
        C, t, index = [], [], []
        for g, (coefficients, bound) in ((g, row) for g, rows in enumerate(groups) for row in rows):
            line = torch.zeros(outputs, dtype=torch.float64)
            if any(int(name[2:]) >= outputs for name in coefficients):
                raise FormatError(f"{path}: expected constants up to Y_{outputs - 1}, got {', '.join(coefficients)}")
            for name, factor in coefficients.items():
                line[int(name[2:])] = factor
            C.append(line)
            t.append(bound)
            index.append(g)
        box = Box(low.view(size), high.view(size))
        pairs.append((box, Property(torch.stack(C), torch.tensor(t, dtype=torch.float64), torch.tensor(index))))
    return pairs


def _parse(text: str, path: str | Path) -> Iterator[list[Any]]:
    """S-expressions."""
    stack: list[list[Any]] = []
    for token in re.findall(r"[()]|[^\s()]+", text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if not stack:
                raise FormatError(f"{path}: a parenthesis closes nothing")
            form = stack.pop()
            if not stack:
                yield form
            else:
                stack[-1].append(form)
        elif stack:
            stack[-1].append(token)
        else:
            raise FormatError(f"{path}: expected a parenthesis, got {token!r}")
    if stack:
        raise FormatError(f"{path}: a parenthesis is not closed")


def _dnf(form: Any, path: str | Path) -> list[list[Atom]]:
    """A formula as alternatives, each a list of atoms."""
    head, *rest = form
    if head == "or":
        return [case for part in rest for case in _dnf(part, path)]
    if head == "and":
        parts = [_dnf(part, path) for part in rest]
        return [list(itertools.chain(*picked)) for picked in itertools.product(*parts)]
    if head in ("<=", ">=") and len(rest) == 2:
        (left, a), (right, b) = _linear(rest[0], path), _linear(rest[1], path)
        sign = 1.0 if head == "<=" else -1.0
        names = {**left, **right}
        coefficients = {n: sign * (left.get(n, 0.0) - right.get(n, 0.0)) for n in names}
        return [[({n: c for n, c in coefficients.items() if c}, sign * (b - a))]]
    raise FormatError(f"{path}: expected and, or, <= or >=, got {head!r}")


def _linear(term: Any, path: str | Path) -> tuple[dict[str, float], float]:
    """A constant or a number, or a sum, difference or multiple of such."""
    if isinstance(term, str):
        if re.fullmatch(r"[XY]_\d+", term):
            return {term: 1.0}, 0.0
        try:
            return {}, float(term)
        except ValueError:
            raise FormatError(f"{path}: expected a number or X_i or Y_j, got {term!r}") from None
    head, *rest = term
    parts = [_linear(part, path) for part in rest]
    if head in ("+", "-"):
        signs = (
            [1.0] + [1.0 if head == "+" else -1.0] * (len(parts) - 1)
            if len(parts) > 1
            else [1.0 if head == "+" else -1.0]
        )
        total: dict[str, float] = {}
        for sign, (coefficients, _) in zip(signs, parts, strict=True):
            for name, factor in coefficients.items():
                total[name] = total.get(name, 0.0) + sign * factor
        return total, sum(sign * constant for sign, (_, constant) in zip(signs, parts, strict=True))
    if head == "*" and len(parts) == 2 and (not parts[0][0] or not parts[1][0]):
        (_, factor), (coefficients, constant) = parts if not parts[0][0] else (parts[1], parts[0])
        return {n: factor * c for n, c in coefficients.items()}, factor * constant
    raise FormatError(f"{path}: expected a linear term, got {head!r}")


def write_vnnlib(path: str | Path, box: Box, prop: Property, comment: str = "") -> Path:
    """Write a property.

    Bounds are widened by one step of float32 and written so that reading gives the same float64 numbers: a point of the
    box stays in it, however a tool reads the file.
    """
    if len(box) != 1:
        raise ValueError(f"expected one box, got {len(box)}")
    low, high = (t.detach().cpu().flatten().to(torch.float32) for t in (box.lower, box.upper))
    low = torch.nextafter(low, torch.full_like(low, -torch.inf)).double()
    high = torch.nextafter(high, torch.full_like(high, torch.inf)).double()
    lines = [f"; {comment}"] if comment else []
    lines += [f"(declare-const X_{i} Real)" for i in range(len(low))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(prop.C.shape[1])]
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        lines += [f"(assert (>= X_{i} {_number(a)}))", f"(assert (<= X_{i} {_number(b)}))"]
    groups = []
    for g in prop.groups.unique().tolist():
        rows = (prop.groups == g).nonzero()[:, 0].tolist()
        groups.append("(and " + " ".join(_row(prop.C[r], float(prop.t[r])) for r in rows) + ")")
    lines.append("(assert (or " + " ".join(groups) + "))")
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)


def _row(coefficients: Tensor, bound: float) -> str:
    """$C_r z \\le t_r$; a difference of two outputs in the form that all tools read."""
    terms = [(j, c) for j, c in enumerate(coefficients.tolist()) if c]
    if bound == 0 and len(terms) == 2 and {terms[0][1], terms[1][1]} == {1.0, -1.0}:
        plus, minus = (terms[0][0], terms[1][0]) if terms[0][1] > 0 else (terms[1][0], terms[0][0])
        return f"(>= Y_{minus} Y_{plus})"
    if len(terms) == 1 and terms[0][1] in (1.0, -1.0):
        j, c = terms[0]
        return f"(<= Y_{j} {_number(bound)})" if c > 0 else f"(>= Y_{j} {_number(-bound)})"
    written = [f"(* {_number(c)} Y_{j})" for j, c in terms]
    return (
        f"(<= (+ {' '.join(written)}) {_number(bound)})" if len(written) > 1 else f"(<= {written[0]} {_number(bound)})"
    )


def _number(value: float) -> str:
    """Digits that give the same float64, without an exponent, which not all tools read."""
    return np.format_float_positional(value, unique=True, trim="0")


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise TorchfolioError('reading and writing ONNX needs onnx: pip install "torchfolio[verify]"') from error
    return onnx


def read_onnx(path: str | Path) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Read a network: layers in evaluation mode, and the shape of one input without its batch axis.

    Known operators: Gemm, MatMul, Add, Sub, Mul, Div (by constants), Conv, Relu, Sigmoid, Tanh, Flatten, Reshape (to a flat
    input), AveragePool, BatchNormalization, Identity, Dropout, Constant.

    Raises:
        FormatError: on another operator, or a network that is no chain of layers.
    """
    onnx = _onnx()
    graph = onnx.load(str(path)).graph
    constants = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    sources = [i for i in graph.input if i.name not in constants]
    if len(sources) != 1:
        raise FormatError(f"{path}: expected one input, got {len(sources)}")
    dims = [d.dim_value for d in sources[0].type.tensor_type.shape.dim]
    shape = tuple(dims[1:]) if len(dims) > 1 else tuple(dims)
    reader = _Reader(path, constants, onnx, shape)
    current = sources[0].name
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = torch.from_numpy(onnx.numpy_helper.to_array(node.attribute[0].t).copy())
            continue
        if current not in node.input:
            raise FormatError(f"{path}: expected a chain of layers, {node.op_type} reads {', '.join(node.input)}")
        reader.add(node, current)
        current = node.output[0]
    ends = [o.name for o in graph.output]
    if ends != [current]:
        raise FormatError(f"{path}: expected one output, that of the last layer {current!r}, got {', '.join(ends)}")
    return nn.Sequential(*reader.layers).eval(), shape


class _Reader:
    """Turns nodes into layers one after the other."""

    def __init__(self, path: str | Path, constants: dict[str, Tensor], onnx: Any, shape: Sequence[int]) -> None:
        self.path, self.constants, self.onnx = path, constants, onnx
        self.layers: list[nn.Module] = []
        self.x = torch.zeros(1, *shape)  # runs along, for the shapes

    def add(self, node: Any, current: str) -> None:
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        self._expect(node, attributes)
        given = [self.constants.get(name) for name in node.input]
        place = list(node.input).index(current)
        before = len(self.layers)
        known = {
            "Relu": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "Identity": nn.Identity, "Dropout": nn.Identity,
        }  # fmt: skip
        if node.op_type in known:
            self.layers.append(known[node.op_type]())
        elif node.op_type in ("Flatten", "Reshape"):
            self._flatten(node, attributes, given)
        elif node.op_type in ("Add", "Sub", "Mul", "Div"):
            self._elementwise(node.op_type, given, place)
        elif node.op_type in ("MatMul", "Gemm"):
            self._linear(node.op_type, attributes, given, place)
        elif node.op_type in ("Conv", "AveragePool", "BatchNormalization"):
            self.layers.append(getattr(self, f"_{node.op_type.lower()}")(attributes, given))
        else:
            raise FormatError(f"{self.path}: the operator {node.op_type} is not known")
        try:
            with torch.no_grad():
                self.x = nn.Sequential(*self.layers[before:]).eval()(self.x)
        except RuntimeError as error:
            raise FormatError(
                f"{self.path}: {node.op_type} does not fit inputs of {tuple(self.x.shape)}: {error}"
            ) from None
        if len(self.x) != 1:
            raise FormatError(f"{self.path}: expected {node.op_type} to keep the batch axis, got {tuple(self.x.shape)}")

    def _expect(self, node: Any, attributes: dict[str, Any]) -> None:
        """That no attribute changes what an operator does in a way that is not read here."""
        defaults = {
            "auto_pad": (b"NOTSET",), "ceil_mode": (0,), "training_mode": (0,), "axis": (1,), "broadcast": (),
            "spatial": (1,), "transA": (0,), "allowzero": (0,),
        }  # fmt: skip
        for name, allowed in defaults.items():
            if name in attributes and attributes[name] not in allowed:
                raise FormatError(f"{self.path}: {node.op_type} with {name} {attributes[name]} is not known")
        if node.op_type == "AveragePool" and any(d != 1 for d in attributes.get("dilations", ())):
            raise FormatError(f"{self.path}: AveragePool with dilations {attributes['dilations']} is not known")

    def _flatten(self, node: Any, attributes: dict[str, Any], given: list[Tensor | None]) -> None:
        target = given[1].tolist() if node.op_type == "Reshape" and given[1] is not None else None
        size = self.x[0].numel()
        if node.op_type == "Reshape" and (
            target is None or len(target) > 2 or target[-1] not in (-1, size) or target[:-1] not in ([], [1], [-1], [0])
        ):
            raise FormatError(f"{self.path}: expected {node.op_type} to flatten each input, got {target}")
        self.layers.append(nn.Flatten())

    def _elementwise(self, kind: str, given: list[Tensor | None], place: int) -> None:
        constant = given[1 - place]
        if constant is None:
            raise FormatError(f"{self.path}: expected {kind} with a constant, got two tensors of the network")
        constant = constant.float()
        last = self.layers[-1] if self.layers else None
        if (
            kind == "Add"
            and isinstance(last, nn.Linear)
            and last.bias is None
            and constant.numel() == last.out_features
        ):
            last.bias = nn.Parameter(constant.flatten().clone())
            return
        one = torch.ones(())
        if (kind, place) == ("Div", 1):
            raise FormatError(f"{self.path}: a division by the network's values is not linear")
        forms = {
            ("Add", 0): (one, constant), ("Add", 1): (one, constant), ("Sub", 0): (one, -constant),
            ("Sub", 1): (-one, constant), ("Mul", 0): (constant, 0 * one), ("Mul", 1): (constant, 0 * one),
            ("Div", 0): (1 / constant, 0 * one),
        }  # fmt: skip
        self.layers.append(ElementwiseAffine(*forms[kind, place]))

    def _linear(self, kind: str, attributes: dict[str, Any], given: list[Tensor | None], place: int) -> None:
        weight = given[1 - place]
        if weight is None or weight.dim() != 2:
            raise FormatError(f"{self.path}: expected {kind} with a constant matrix")
        if place != 0:
            raise FormatError(f"{self.path}: expected {kind} of the network's values with a matrix, in this order")
        scale = float(attributes.get("alpha", 1.0))
        weight = scale * (weight if attributes.get("transB", 0) else weight.T)
        bias = given[2] if len(given) > 2 else None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(float(attributes.get("beta", 1.0)) * bias.flatten())
        self.layers.append(layer)

    def _conv(self, attributes: dict[str, Any], given: list[Tensor | None]) -> nn.Module:
        weight, bias = given[1], given[2] if len(given) > 2 else None
        if weight is None or weight.dim() != 4:
            raise FormatError(f"{self.path}: expected Conv with constant weights of two spatial axes")
        groups = attributes.get("group", 1)
        layer = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], (weight.shape[2], weight.shape[3]), tuple(attributes.get("strides", (1, 1))),
            self._padding(attributes), tuple(attributes.get("dilations", (1, 1))), groups, bias is not None,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
        return layer

    def _averagepool(self, attributes: dict[str, Any], given: list[Tensor | None]) -> nn.Module:
        include = bool(attributes.get("count_include_pad", 0))
        return nn.AvgPool2d(
            tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", (1, 1))), self._padding(attributes),
            count_include_pad=include,
        )  # fmt: skip

    def _padding(self, attributes: dict[str, Any]) -> tuple[int, int]:
        pads = attributes.get("pads", (0, 0, 0, 0))
        if list(pads[:2]) != list(pads[2:]):
            raise FormatError(f"{self.path}: expected the same padding on both sides, got {list(pads)}")
        return int(pads[0]), int(pads[1])

    def _batchnormalization(self, attributes: dict[str, Any], given: list[Tensor | None]) -> nn.Module:
        scale, bias, mean, var = (t for t in given[1:5] if t is not None)
        factor = scale * torch.rsqrt(var + float(attributes.get("epsilon", 1e-5)))
        wide = (1, -1, *[1] * (self.x.dim() - 2))
        return ElementwiseAffine(factor.view(wide), (bias - mean * factor).view(wide))


def write_onnx(model: nn.Module, path: str | Path, shape: Sequence[int]) -> Path:
    """Write a (nested) `nn.Sequential` of known layers, float32, for one input `[1, *shape]` named `X`, output `Y`.

    Raises:
        TypeError: on a layer without an operator here.
    """
    onnx = _onnx()
    helper = onnx.helper
    nodes, constants = [], []

    def constant(name: str, value: Tensor) -> str:
        constants.append(onnx.numpy_helper.from_array(value.detach().cpu().float().contiguous().numpy(), name))
        return name

    x, current = torch.zeros(1, *shape), "X"
    for k, layer in enumerate(_flat(model)):
        if isinstance(layer, nn.Identity | nn.Dropout):
            continue
        operator, inputs, attributes = _operator(layer, f"l{k}", constant)
        nodes.append(helper.make_node(operator, [current, *inputs], [f"t{k}"], **attributes))
        current = f"t{k}"
        with torch.no_grad():
            x = copy.deepcopy(layer).float().cpu().eval()(x)
    nodes.append(helper.make_node("Identity", [current], ["Y"]))
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, *size])
        for name, size in (("X", shape), ("Y", x.shape[1:]))
    ]
    graph = helper.make_graph(nodes, "network", [ends[0]], [ends[1]], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made)
    onnx.save(made, str(path))
    return Path(path)


def _operator(layer: nn.Module, name: str, constant: Any) -> tuple[str, list[str], dict[str, Any]]:
    """ONNX operator of a layer, its constants and attributes."""
    simple = {nn.ReLU: "Relu", nn.Sigmoid: "Sigmoid", nn.Tanh: "Tanh"}
    if type(layer) in simple:
        return simple[type(layer)], [], {}
    if not _is(layer, AFFINE):
        raise TypeError(f"{type(layer).__name__} cannot be written to ONNX here")
    if isinstance(layer, nn.Flatten):
        if (layer.start_dim, layer.end_dim) != (1, -1):
            raise TypeError(f"expected nn.Flatten(1, -1) to write it to ONNX, got {layer}")
        return "Flatten", [], {"axis": 1}
    if isinstance(layer, nn.Linear):
        bias = layer.bias if layer.bias is not None else torch.zeros(layer.out_features)
        return "Gemm", [constant(f"{name}.weight", layer.weight), constant(f"{name}.bias", bias)], {"transB": 1}
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise TypeError("expected a convolution with numbers for its padding, of zeros, to write it to ONNX")
        inputs = [constant(f"{name}.weight", layer.weight)]
        inputs += [constant(f"{name}.bias", layer.bias)] if layer.bias is not None else []
        return "Conv", inputs, {
            "kernel_shape": list(layer.kernel_size), "strides": list(layer.stride), "dilations": list(layer.dilation),
            "pads": [*layer.padding, *layer.padding], "group": layer.groups,
        }  # fmt: skip
    if isinstance(layer, nn.AvgPool2d):
        if layer.ceil_mode or layer.divisor_override is not None:
            raise TypeError(f"expected a pool without ceil_mode and divisor_override to write it to ONNX, got {layer}")
        kernel, stride, padding = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
        return "AveragePool", [], {
            "kernel_shape": kernel, "strides": stride, "pads": padding * 2, "count_include_pad": int(layer.count_include_pad),
        }  # fmt: skip
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.running_mean is None or layer.running_var is None:
            raise TypeError("expected a batch norm with running statistics to write it to ONNX")
        ones = torch.ones(layer.num_features)
        values = {
            "scale": ones if layer.weight is None else layer.weight, "shift": 0 * ones if layer.bias is None else layer.bias,
            "mean": layer.running_mean, "var": layer.running_var,
        }  # fmt: skip
        return "BatchNormalization", [constant(f"{name}.{k}", v) for k, v in values.items()], {"epsilon": layer.eps}
    raise TypeError(f"{type(layer).__name__} cannot be written to ONNX here")


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, tuple | list) else [int(value)] * 2
