"""A second head on a classifier, in training alone, and the gradients of two heads in one backbone.

Penghui Yang, Chen-Chen Zong, Sheng-Jun Huang, Lei Feng, Bo An, "Dual-Head Knowledge Distillation: Enhancing Logits
Utilization with an Auxiliary Head", KDD 2025, https://arxiv.org/abs/2411.08937.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfolio.checks import one_of
from torchfolio.engine import Batch, evaluating

__all__ = ["DualHead", "align_gradients", "linear_name", "teacher_logits"]

Aux = Literal["linear", "mlp"] | nn.Module


class DualHead(nn.Module):
    """A classifier with a second head on the features that its last layer reads.

    In training it returns (logits, auxiliary logits), in evaluation mode the logits. The classifier itself is not
    changed: `student()` gives it back as it came, with its own names of weights.

    Args:
        model: classifier whose last layer is an `nn.Linear` on features `[N, d]`.
        layer: name of that layer; the last `nn.Linear` among its modules by default.
        aux: `"linear"`, for teachers of the student's architecture; `"mlp"` (d to 200, dropout 0.1, batch norm, ReLU,
            to K), for others; or a module from `[N, d]` to `[N, K]`.

    Shapes:
        Whatever the model takes, to `[N, K]` once or twice.

    Raises:
        ValueError: if there is no such layer or it is not linear; in the call, if it does not run once on `[N, d]`.

    Reference:
        Yang et al., KDD 2025, section 4; width and order of the `"mlp"` follow the released code.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, aux: Aux = "mlp") -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a network, got {type(model).__name__}")
        self.model, self.layer = model, linear_name(model, layer)
        self.aux = aux if isinstance(aux, nn.Module) else self._head(one_of("aux", aux, ("linear", "mlp")))
        if {id(p) for p in self.aux.parameters()} & {id(p) for p in model.parameters()}:
            raise ValueError("the second head shares weights with the network; expected a head of its own")

    @property
    def classifier(self) -> nn.Linear:
        """The network's own head."""
        return self.model.get_submodule(self.layer)  # pyright: ignore[reportReturnType]

    def _head(self, kind: str) -> nn.Module:
        own = self.classifier
        like: dict[str, Any] = {"device": own.weight.device, "dtype": own.weight.dtype}
        if kind == "linear":
            return nn.Linear(own.in_features, own.out_features, **like)
        hidden = 200
        return nn.Sequential(
            nn.Linear(own.in_features, hidden, **like), nn.Dropout(0.1), nn.BatchNorm1d(hidden, **like), nn.ReLU(),
            nn.Linear(hidden, own.out_features, **like),
        )  # fmt: skip

    @contextmanager
    def features(self) -> Iterator[list[Tensor]]:
        """What the classifier reads in a `with` block, one entry a pass."""
        seen: list[Tensor] = []
        handle = self.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            handle.remove()

    def auxiliary(self, seen: Sequence[Tensor]) -> Tensor:
        """Logits of the second head on what `features` saw."""
        if len(seen) != 1 or seen[0].dim() != 2:
            shapes = ", ".join(str(tuple(h.shape)) for h in seen) or "nothing"
            raise ValueError(f"expected {self.layer or 'the classifier'} to read features [N, d] once, got {shapes}")
        return self.aux(seen[0])

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.training:
            return self.model(*inputs)
        with self.features() as seen:
            logits = self.model(*inputs)
        return logits, self.auxiliary(seen)

    def student(self) -> nn.Module:
        """The classifier alone."""
        return self.model


def linear_name(model: nn.Module, layer: str | None) -> str:
    """The name of a classifier's last layer, looked up or looked for."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if layer is None and linear:
        return linear[-1]
    if layer is None or layer not in linear:
        asked = "a classifier that ends" if layer is None else f"layer {layer!r}"
        raise ValueError(f"expected {asked} in an nn.Linear of the network; it has {', '.join(linear) or 'none'}")
    return layer


def teacher_logits(teacher: nn.Module | None, batch: Batch) -> Tensor:
    """The teacher's logits for a batch (x, y), in evaluation mode, in its own precision and without gradients.

    Args:
        teacher: network; `None` takes the logits that are stored in the batch (x, logits, y).
        batch: tensors.

    Raises:
        ValueError: if there is neither a teacher nor stored logits.
    """
    if teacher is None:
        if len(batch) != 3:
            raise ValueError(f"expected a teacher, or batches (x, teacher logits, y), got {len(batch)} tensors")
        return batch[1]
    weight = next((p for p in teacher.parameters() if p.is_floating_point()), batch[0])
    inputs = [x.to(weight.dtype) if x.is_floating_point() else x for x in batch[:-1]]
    with torch.no_grad(), evaluating(teacher), torch.autocast(batch[0].device.type, enabled=False):
        return teacher(*inputs)


def align_gradients(primary: Sequence[Tensor], secondary: Sequence[Tensor]) -> list[Tensor]:
    """Take out of the secondary gradient what opposes the primary one:

    $$g_b - \\min\\Bigl(0, \\frac{\\langle g_b, g_c\\rangle}{\\|g_c\\|^2}\\Bigr) g_c.$$

    Args:
        primary: gradients $g_c$, a tensor for each parameter; together one vector.
        secondary: gradients $g_b$ of the same shapes.

    Returns:
        The new secondary gradient; the old one where the two do not conflict.

    Raises:
        ValueError: if the shapes differ.

    Reference:
        Yang et al., KDD 2025, section 4; Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.
    """
    if [g.shape for g in primary] != [g.shape for g in secondary]:
        raise ValueError("expected primary and secondary gradients of the same shapes")
    if not primary:
        return []
    product, square, _ = products(primary, secondary)
    share = -(product.clamp(max=0) / square.clamp_min(torch.finfo(square.dtype).tiny))
    return list(torch._foreach_add(list(secondary), torch._foreach_mul(list(primary), share)))


def products(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Inner product and squared norms of two vectors in pieces."""
    dot = lambda x, y: torch.stack([torch.dot(p.flatten(), q.flatten()) for p, q in zip(x, y, strict=True)]).sum()  # noqa: E731
    return dot(a, b), dot(a, a), dot(b, b)


class Delivered(torch.autograd.Function):
    """A scalar whose backward pass hands over gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *torch._foreach_mul(ctx.gradients, outer[0])
