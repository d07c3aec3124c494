"""Floating-point operations of a network, and of each of its modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from torchfolio.measure.untouched import untouched
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

HEAVY = (
    "mm", "mv", "linear", "conv", "rnn", "lstm", "gru", "attention", "transformer", "mkldnn", "cudnn", "quantized", "cdist",
    "pdist", "euclidean", "fft", "linalg", "cholesky", "solve", "inverse", "svd", "geqrf", "ormqr", "householder", "lstsq",
)  # fmt: skip
"""What the names of operators hold that multiply matrices, decompose or transform them, in torch and in what extends it."""


LIGHT = ("linalg_vector_norm", "linalg_cross", "linalg_diagonal", "linalg_vecdot", "fft_fftfreq", "fft_rfftfreq")
"""Names that sound so and are not."""


class FlopCounter(Shown, FlopCounterMode):
    """Torch's counter with more formulas; it remembers operators that by their names multiply matrices and have none.

    While it counts, layers run operator by operator: the fused kernels of attention, transformer layers and recurrent
    layers, which differ between training and evaluation and from device to device, hide their products.

    Attributes:
        missed: names of operators that are not counted, those met so far.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_formulas())
        self.missed: set[str] = set()
        self._plain = ExitStack()

    def __enter__(self) -> Self:
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._plain.callback(torch.backends.mha.set_fastpath_enabled, fused)
        for backend in (torch.backends.mkldnn, torch.backends.cudnn):
            self._plain.callback(setattr, backend, "enabled", backend.enabled)
            setattr(backend, "enabled", False)  # noqa: B010
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        with self._plain:
            return super().__exit__(*error)

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        name = func_packet.__name__
        heavy = any(word in name for word in HEAVY) and name not in LIGHT
        if func_packet not in self.flop_registry and heavy:
            self.missed.add(name)
        return super()._count_flops(func_packet, out, args, kwargs)

    def warn(self) -> None:
        """Say what was missed."""
        if self.missed:
            warnings.warn(f"not counted: {', '.join(sorted(self.missed))}", stacklevel=3)


def _formulas() -> dict[Any, Any]:
    """Those that torch lacks: attention on the CPU, products with vectors, bilinear layers."""
    aten = torch.ops.aten

    def with_vector(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(a)

    def vector_added(to: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(a)

    def batches_added(to: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    def trilinear(a: Any, b: Any, c: Any, *expand: Any, **kwargs: Any) -> int:
        shapes = [list(shape) for shape in (a, b, c)]
        for shape, places in zip(shapes, expand, strict=False):
            for place in places:
                shape.insert(place, 1)
        return 2 * math.prod(torch.broadcast_shapes(*shapes))

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    return {
        aten.mv: with_vector,
        aten.dot: with_vector,
        aten.vdot: with_vector,
        aten.addmv: vector_added,
        aten.addbmm: batches_added,
        aten._trilinear: trilinear,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def count_flops(model: nn.Module | Callable[..., Any], *inputs: Tensor, backward: bool = False) -> int:
    """Floating-point operations of one forward pass, by torch's counter. They are the same in training and evaluation
    and on every device. Warns of operators that multiply matrices and have no formula.

    Matrix products, convolutions and attention count, two operations for a multiply-add; element-wise work,
    normalisation and pooling do not. A convolution with $C$ input channels in groups of $C / g$, a window of
    $k$ numbers and an output of $M$ numbers in total costs $2 M k C / g$.

    Args:
        model: a module or callable. A module keeps its gradients, buffers and mode.
        *inputs: its inputs.
        backward: whether to count, too, the backward pass of the output's sum, to every trainable parameter and to the
            inputs that require a gradient.

    Returns:
        The number of operations.

    Raises:
        TypeError: with `backward`, if the model does not return a tensor.
        ValueError: with `backward`, if nothing requires a gradient.
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    guard = untouched(model) if isinstance(model, nn.Module) else nullcontext()
    with guard, FlopCounter() as counter, torch.set_grad_enabled(backward):
        output = model(*inputs)
        if backward:
            _backward(output, [t for t in (*parameters, *inputs) if isinstance(t, Tensor) and t.requires_grad])
    counter.warn()
    return counter.get_total_flops()


def _backward(output: Any, leaves: Sequence[Tensor]) -> None:
    """Go backward from the sum of the output, and put the leaves' own gradients back."""
    if not isinstance(output, Tensor):
        raise TypeError(f"expected the model to return a tensor to go backward from, got {type(output).__name__}")
    if not leaves:
        raise ValueError("expected trainable parameters or an input that requires a gradient, got none")
    held = [t.grad for t in leaves]
    try:
        for t in leaves:
            t.grad = None
        output.sum().backward()  # the counter's hooks do not work under torch.autograd.grad
    finally:
        for t, gradient in zip(leaves, held, strict=True):
            t.grad = gradient


def flops_by_module(model: nn.Module, *inputs: Tensor) -> pd.DataFrame:
    """Operations, parameters and output shape of every module that has no children.

    What a parent computes itself, between its children, is in no row: `count_flops` gives the whole.

    Args:
        model: network; buffers and mode are left as they were.
        *inputs: its inputs.

    Returns:
        A row for each call, in running order: `name` (a layer that runs twice has two rows, its parameters in
        the first), `type`, `parameters` (its own), `flops` (forward), `shape` (of the output; `None` for no
        tensor).
    """
    import pandas as pd

    rows: list[dict[str, object]] = []
    starts: dict[str, int] = {}
    seen: set[str] = set()
    counter = FlopCounter()
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue

        def before(m: nn.Module, args: object, name: str = name) -> None:
            starts[name] = counter.get_total_flops()

        def after(m: nn.Module, args: object, out: Any, name: str = name) -> None:
            rows.append(
                {
                    "name": name,
                    "type": type(m).__name__,
                    "parameters": 0 if name in seen else sum(p.numel() for p in m.parameters(recurse=False)),
                    "flops": counter.get_total_flops() - starts[name],
                    "shape": tuple(out.shape) if isinstance(out, Tensor) else None,
                }
            )
            seen.add(name)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with untouched(model), counter, torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    counter.warn()
    return pd.DataFrame(rows, columns=["name", "type", "parameters", "flops", "shape"])


def _names(callables: Sequence[Callable[[], object]]) -> dict[str, Callable[[], object]]:
    named: dict[str, Callable[[], object]] = {}
    for k, call in enumerate(callables):
        name = getattr(call, "__name__", None)
        # Two lambdas have one name.
        named[str(k) if name is None or name == "<lambda>" or name in named else name] = call
    return named
