"""Products with a Hessian that is never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchfolio.measure.batches import Data, batches, taking
from torchfolio.models.stateful import fresh
from torchfolio.shown import Shown

Product = Callable[[Tensor], Tensor]


Parameters = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Several tensors as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`."""
    parts = vector.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


@overload
def hvp(loss: Callable[[], Tensor], parameters: Parameters, vector: Tensor) -> Tensor: ...


@overload
def hvp(
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], vector: Mapping[str, Tensor]
) -> dict[str, Tensor]: ...


@overload
def hvp(loss: Callable[[], Tensor], parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]: ...


def hvp(
    loss: Callable[[], Tensor], parameters: Parameters, vector: Parameters
) -> Tensor | dict[str, Tensor] | list[Tensor]:
    """Hessian-vector product $H v = \\nabla_\\theta (\\nabla_\\theta \\ell^\\top v)$, by differentiating the
    gradient.

    Args:
        loss: computes the scalar loss $\\ell$ from the parameters.
        parameters: $\\theta$, what the Hessian is taken in: tensors that require a gradient.
        vector: $v$: tensors arranged as the parameters are, or one vector of all of them.

    Returns:
        $H v$, arranged as `vector` is.

    Raises:
        ValueError: if the vector does not fit the parameters, or the loss is not a scalar.

    Reference:
        Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.
    """
    leaves = _leaves(parameters)
    if isinstance(vector, Mapping):
        if not isinstance(parameters, Mapping) or set(vector) != set(parameters):
            raise ValueError(f"expected a vector with the names of the parameters, got {list(vector)[:5]}")
        vector = {name: vector[name] for name in parameters}
    parts = _leaves(vector)
    sizes, expected = [p.numel() for p in parts], [p.numel() for p in leaves]
    flat = len(parts) == 1 and parts[0].shape == (sum(expected),)
    if not flat and [p.shape for p in parts] != [p.shape for p in leaves]:
        raise ValueError(
            f"expected a vector of {sum(expected)} numbers in parts {expected}, got {sum(sizes)} in {sizes}"
        )
    product = _products(loss, leaves)(flatten(parts))
    if isinstance(vector, Tensor):
        return product.view_as(vector)
    result = unflatten(product, leaves)
    return dict(zip(parameters, result, strict=True)) if isinstance(parameters, Mapping) else result


def _leaves(tree: Parameters) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return list(tree.values()) if isinstance(tree, Mapping) else list(tree)


def _products(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Product:
    """Products with the Hessian of one loss; the gradient's graph is built once and kept."""
    # The fused kernels of attention have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss()
        if value.numel() != 1:
            raise ValueError(f"expected the loss to be a scalar, got shape {tuple(value.shape)}")
        gradient = flatten(torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True))

    def product(vector: Tensor) -> Tensor:
        if not gradient.requires_grad:  # a linear loss has no curvature
            return torch.zeros_like(vector)
        second = torch.autograd.grad(gradient, parameters, vector, retain_graph=True, materialize_grads=True)
        return flatten(second).detach()

    return product


class Hessian(Shown):
    """The Hessian of a network's mean loss over a data set, as a linear operator.

    $$H = \\frac{1}{N} \\sum_{i=1}^N \\nabla_\\theta^2\\, \\ell(f_\\theta(x_i), y_i), \\qquad
      \\theta \\text{: the parameters that require a gradient, as one vector.}$$

    Call it on a vector `[n]` for $H v$. The network is used in the mode it is in and its buffers do not
    change: in evaluation mode batch norm uses its running statistics, in training mode those of each batch.
        Data in one batch
    keep their graph between products, which makes a product as cheap as two backward passes; batches that
    pass by one at a time cost a forward pass and three backward passes each, in the memory of one batch.

    Args:
        model: network.
        loss: criterion on (outputs, targets) with mean reduction.
        data: (x, y), a data set, or batches that can be gone through repeatedly.
        batch_size: batch size of tensors and data sets; `None` takes all at once.
        names: parameters that the Hessian is taken in; all that require a gradient by default.

    Attributes:
        n: number of parameters.
        names: their names, in the order of the vector.

    Raises:
        ValueError: if a dropout is active (every product would have another Hessian), a name is unknown,
            there is nothing to differentiate, or no example.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        data: Data,
        *,
        batch_size: int | None = None,
        names: Iterable[str] | None = None,
    ) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
                raise ValueError(
                    f"{name} drops units at random, so that no two products agree; call model.eval() first"
                )
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names = list(trainable if names is None else names)
        if unknown := [n for n in self.names if n not in trainable]:
            raise ValueError(f"{unknown[0]!r} is no parameter that requires a gradient")
        if not self.names:
            raise ValueError("expected a parameter that requires a gradient, got none")
        self.model, self.loss, self.data, self.batch_size = model, loss, data, batch_size
        self._parameters = [trainable[n] for n in self.names]
        self.n = sum(p.numel() for p in self._parameters)
        self.device, self.dtype = self._parameters[0].device, self._parameters[0].dtype
        self._kept: tuple[list[int], Product] | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """$H v$ for a vector `[n]`."""
        if vector.shape != (self.n,):
            raise ValueError(f"expected a vector of {self.n} numbers, got {tuple(vector.shape)}")
        # Weights or statistics that changed since need another graph.
        versions = [t._version for t in (*self.model.parameters(), *self.model.buffers())]
        if self._kept is not None and self._kept[0] == versions:
            return self._kept[1](vector)
        self._kept = None
        total, examples, product = torch.zeros_like(vector), 0, None
        for count, (x, y) in enumerate(batches(self.data, self.batch_size, self.device)):
            product = _products(lambda x=x, y=y: self._loss(x, y), self._parameters)
            total += len(x) * product(vector)
            examples += len(x)
            if count:
                product = None
        if product is not None:
            self._kept = versions, product
        return total / examples

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        with fresh(self.model), taking(self.model, x, y):
            return self.loss(functional_call(self.model, buffers, (x,)), y)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector `[n]` as tensors by parameter name."""
        return dict(zip(self.names, unflatten(vector, self._parameters), strict=True))
