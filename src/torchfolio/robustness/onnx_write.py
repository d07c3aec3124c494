"""Writing networks as ONNX files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.robustness.affine_layers import ElementwiseAffine, Residual
from torchfolio.robustness.layer_list import AFFINE, flat_layers, is_exactly
from torchfolio.robustness.onnx_constants import onnx_package
from torchfolio.robustness.onnx_layers import pair

__all__ = ["write_onnx"]


def write_onnx(model: nn.Module, path: str | Path, shape: Sequence[int]) -> Path:
    """Write a (nested) `nn.Sequential` of known layers and sums of two paths, for one input `[1, *shape]` named `X`, output
    `Y`.

    Networks of doubles are written as such, all others in float32.

    Raises:
        TypeError: on a layer without an operator here.
    """
    writer = _Writer(model)
    x, last = writer.append(model, torch.zeros(1, *shape, dtype=writer.dtype), "X")
    return writer.save(path, shape, tuple(x.shape[1:]), last)


class _Writer:
    """Nodes and constants of a graph."""

    def __init__(self, model: nn.Module) -> None:
        self.onnx = onnx_package()
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.double = any(t.dtype == torch.float64 for t in model.state_dict().values())
        self.dtype = torch.float64 if self.double else torch.float32

    def constant(self, name: str, value: Tensor) -> str:
        """The name of a constant that is written."""
        array = value.detach().cpu().to(self.dtype).contiguous().numpy()
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, inputs: list[str], attributes: dict[str, Any]) -> str:
        """The name of the values that a node gives."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [name], **attributes))
        return name

    def append(self, model: nn.Module, x: Tensor, current: str) -> tuple[Tensor, str]:
        """Write a network on the values of a name; what it makes of an input, and the name of that."""
        for layer in flat_layers(model):
            if isinstance(layer, Residual):
                body, first = self.append(layer.body, x, current)
                shortcut, second = self.append(layer.shortcut, x, current)
                x, current = body + shortcut, self.node("Add", [first, second], {})
            elif isinstance(layer, ElementwiseAffine):
                name = f"l{len(self.nodes)}"
                scaled = self.node("Mul", [current, self.constant(f"{name}.scale", layer.scale)], {})
                x, current = layer(x), self.node("Add", [scaled, self.constant(f"{name}.shift", layer.shift)], {})
            elif not isinstance(layer, nn.Identity | nn.Dropout):
                operator, inputs, attributes = _operator(layer, f"l{len(self.nodes)}", self.constant)
                current = self.node(operator, [current, *inputs], attributes)
                with torch.no_grad():
                    x = copy.deepcopy(layer).to(self.dtype).cpu().eval()(x)
        return x, current

    def save(self, path: str | Path, shape: Sequence[int], outputs: Sequence[int], last: str) -> Path:
        """Write the graph whose output has the name `last`."""
        helper, proto = self.onnx.helper, self.onnx.TensorProto
        self.nodes.append(helper.make_node("Identity", [last], ["Y"]))
        kind = proto.DOUBLE if self.double else proto.FLOAT
        ends = [helper.make_tensor_value_info(n, kind, [1, *size]) for n, size in (("X", shape), ("Y", outputs))]
        graph = helper.make_graph(self.nodes, "network", [ends[0]], [ends[1]], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        self.onnx.checker.check_model(model)
        self.onnx.save(model, str(path))
        return Path(path)


def _operator(layer: nn.Module, name: str, constant: Any) -> tuple[str, list[str], dict[str, Any]]:
    """ONNX operator of a layer, its constants and attributes."""
    simple = {nn.ReLU: "Relu", nn.Sigmoid: "Sigmoid", nn.Tanh: "Tanh"}
    if type(layer) in simple:
        return simple[type(layer)], [], {}
    if is_exactly(layer, (nn.MaxPool2d,)):
        return "MaxPool", [], _max_pool(layer)
    if not is_exactly(layer, AFFINE):
        raise TypeError(f"{type(layer).__name__} cannot be written to ONNX here")
    if isinstance(layer, nn.Flatten):
        if (layer.start_dim, layer.end_dim) != (1, -1):
            raise TypeError(f"expected nn.Flatten(1, -1) to write it to ONNX, got {layer}")
        return "Flatten", [], {"axis": 1}
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        if layer.output_size not in (1, (1, 1)):
            raise TypeError(f"expected nn.AdaptiveAvgPool2d(1) to write it to ONNX, got {layer}")
        return "GlobalAveragePool", [], {}
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
        kernel, stride, padding = (pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
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


def _max_pool(layer: Any) -> dict[str, Any]:
    if layer.ceil_mode or layer.return_indices:
        raise TypeError(f"expected a pool without ceil_mode and return_indices to write it to ONNX, got {layer}")
    kernel, stride, padding = (pair(v) for v in (layer.kernel_size, layer.stride, layer.padding))
    return {"kernel_shape": kernel, "strides": stride, "pads": padding * 2, "dilations": pair(layer.dilation)}
