"""From a network of ReLUs to a spiking one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from torchfolio.models import replace_layers
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.state import Stateful

__all__ = ["RELU_LIKE", "to_spiking"]

RELU_LIKE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardswish,
)  # fmt: skip
"""Activations that neurons take the place of."""
_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish,
    torch.relu, torch.relu_,
}  # fmt: skip


def to_spiking(
    model: nn.Module,
    neuron: Callable[[], nn.Module] = LIF,
    *,
    average_pool: bool = False,
    example: Tensor | None = None,
) -> nn.Module:
    """Put a layer of spiking neurons in place of every ReLU-like activation, in place.

    Args:
        model: its activations are modules (`nn.ReLU` and the others of `RELU_LIKE`), each used once in forward:
            neurons carry state, so that one used twice would mix two places.
        neuron: makes the neurons of one place, such as `partial(LIF, tau=1.1)`.
        average_pool: whether to put average pooling in place of max pooling.
        example: an input `[B, ...]` to watch the activations on, for networks that `torch.fx` cannot trace.

    Returns:
        The model, or the neuron itself if the model is an activation.

    Raises:
        ValueError: if there is no activation module, one is used more than once, an activation is called as a
            function, or the network can neither be traced nor watched.

    Example:
        >>> net = to_spiking(vgg11(width=0.25), partial(LIF, tau=1.1), average_pool=True)
    """
    names = {m: n for n, m in model.named_modules() if isinstance(m, RELU_LIKE)}
    if not names:
        raise ValueError(f"expected activations such as nn.ReLU in {type(model).__name__}, got none")
    for name, uses in _count_uses(model, example).items():
        if uses > 1:
            raise ValueError(
                f"activation {name!r} is used {uses} times in one forward pass, and neurons there would share "
                "their state; give every place a module of its own"
            )
    if average_pool:
        pools = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
        replace_layers(model, pools, _average_pool, allow_none=True)
    return replace_layers(model, RELU_LIKE, lambda old: neuron())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Stateful) or super().is_leaf_module(m, module_qualified_name)


def _count_uses(model: nn.Module, example: Tensor | None) -> Counter[str]:
    """How often one forward pass calls each activation module."""
    if isinstance(model, RELU_LIKE):
        return Counter()
    copied = copy.deepcopy(model)
    try:
        graph = _Tracer().trace(copied)
    except Exception as error:  # whatever the user's forward does with a proxy
        if example is None:
            raise ValueError(
                f"torch.fx cannot trace {type(model).__name__} to see how often its activations are used ({error}); "
                "pass example=, a batch of inputs"
            ) from error
        return _watch(copied, example)
    uses: Counter[str] = Counter()
    for node in graph.nodes:
        functional = node.op == "call_function" and node.target in _FUNCTIONS
        if functional or (node.op == "call_method" and node.target in ("relu", "relu_")):
            name = getattr(node.target, "__name__", node.target)
            raise ValueError(f"{type(model).__name__} calls {name} as a function; expected modules such as nn.ReLU")
        if node.op == "call_module" and isinstance(copied.get_submodule(str(node.target)), RELU_LIKE):
            uses[str(node.target)] += 1
    return uses


def _watch(model: nn.Module, example: Tensor) -> Counter[str]:
    uses: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, RELU_LIKE):
            module.register_forward_hook(lambda m, a, o, name=name: uses.update([name]))
    with torch.no_grad():
        model.eval()(example)
    return uses


def _average_pool(old: nn.Module) -> nn.Module:
    kind = {nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}[type(old)]
    if old.dilation not in (1, (1,), (1, 1), (1, 1, 1)):
        raise ValueError(f"average pooling has no dilation, got a max pool with {old.dilation}")
    return kind(old.kernel_size, old.stride, old.padding, old.ceil_mode, count_include_pad=False)
