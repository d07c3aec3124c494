"""Second derivatives without the Hessian: products, extreme eigenvalues, the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchfolio.measure.batches import Data, batches
from torchfolio.models.stateful import fresh

Product = Callable[[Tensor], Tensor]
Which = Literal["largest", "smallest", "magnitude", "both"]
Parameters = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

# A warm start must also find an eigenvector that has overtaken the earlier ones, orthogonal to them all: it
# begins with so much noise, relative, and is not believed before so many products.
_NOISE = 0.3
_WARM_PRODUCTS = 6


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


class Hessian:
    """The Hessian of a network's mean loss over a data set, as a linear operator.

    $$H = \\frac{1}{N} \\sum_{i=1}^N \\nabla_\\theta^2\\, \\ell(f_\\theta(x_i), y_i), \\qquad
      \\theta \\text{: the parameters that require a gradient, as one vector.}$$

    Call it on a vector `[n]` for $H v$. The network is used in the mode it is in and its buffers do not
    change: in evaluation mode batch norm uses its running statistics, in training mode those of each batch.
        Data in one batch
    keep their graph between products, which makes a product as cheap as two backward passes; batches that
    pass by one at a time cost a forward pass and three backward passes each, in the memory of one batch.

    Args:
        model: the network.
        loss: criterion on (outputs, targets) with mean reduction.
        data: (x, y), a data set, or batches that can be gone through repeatedly.
        batch_size: of tensors and data sets; `None` takes all at once.
        names: the parameters that the Hessian is taken in; all that require a gradient by default.

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
        with fresh(self.model):
            return self.loss(functional_call(self.model, buffers, (x,)), y)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector `[n]` as tensors by parameter name."""
        return dict(zip(self.names, unflatten(vector, self._parameters), strict=True))


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues and eigenvectors of a symmetric matrix.

    Attributes:
        values: `[k]`, largest first (in magnitude, where that was asked for).
        vectors: `[n, k]`, orthonormal columns; their signs mean nothing.
        residuals: $\\lVert A v - \\lambda v \\rVert$ `[k]`; an eigenvalue lies within it of each value.
        products: how many products with the matrix it took.
        converged: whether all residuals are below the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


class _Krylov:
    """An orthonormal basis that grows by one product at a time, and the matrix in it."""

    def __init__(self, product: Product, start: Tensor, generator: torch.Generator | None) -> None:
        self.product, self.generator = product, generator
        self.n = len(start)
        self.basis = start.new_empty(0, self.n)
        self.size = 0
        self.alphas: list[float] = []
        self.betas: list[float] = []  # the last one couples to the vector that is to come
        self._next = start / start.norm()

    def grow(self) -> None:
        if self.size == len(self.basis):
            room = self.basis.new_empty(min(max(8, self.size), self.n - self.size), self.n)
            self.basis = torch.cat([self.basis, room])
        self.basis[self.size] = self._next
        self.size += 1
        w = self.product(self._next).detach()
        if not w.norm().isfinite():
            raise ValueError("a product with the matrix is not finite")
        self.alphas.append(float(self._next @ w))
        w = self._orthogonal(w)
        beta = float(w.norm())
        scale = max(map(abs, self.alphas + self.betas))
        if self.size < self.n and beta <= self.n**0.5 * torch.finfo(w.dtype).eps * scale:
            # The space is invariant: a fresh direction finds eigenvalues that the start had no part in.
            beta, w = 0.0, self._orthogonal(_random(w, self.generator))
        self.betas.append(beta)
        self._next = w / w.norm()

    def _orthogonal(self, w: Tensor) -> Tensor:
        known = self.basis[: self.size]
        for _ in range(2):  # twice is enough (Parlett)
            w = w - known.T @ (known @ w)
        return w

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, their vectors in the basis, and their residuals."""
        t = torch.diag(torch.tensor(self.alphas, dtype=torch.float64))
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(t + torch.diag(off, 1) + torch.diag(off, -1))
        coupling = self.betas[-1] if self.size < self.n else 0.0
        return values, vectors, (coupling * vectors[-1]).abs()


def lanczos(
    product: Product,
    n: int,
    k: int = 1,
    *,
    which: Which = "largest",
    iterations: int | None = None,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Eigen:
    """Extreme eigenvalues of a symmetric matrix known by its products, with full reorthogonalisation.

    After $m$ products the matrix is $T = Q^\\top A Q$ in an orthonormal basis $Q$ of the Krylov space of the
    start, tridiagonal; eigenpairs $(\\lambda, s)$ of $T$ give $(\\lambda, Q s)$ with residual
    $\\beta_m |s_m|$. An eigenvalue is off by at most its residual, and by about the residual's square over
    the gap to its neighbour.

    Args:
        product: $v \\mapsto A v$ on vectors `[n]`.
        n: size of the matrix.
        k: how many eigenvalues.
        which: `"largest"` or `"smallest"` algebraically, largest in `"magnitude"`, or `"both"` ends (half of
            k from each, the odd one from the top).
        iterations: most products; `min(n, max(20 k, 100))` by default. Their vectors are held in memory.
        tolerance: stop when every residual is below this times the largest eigenvalue in magnitude.
        start: earlier eigenvectors `[n]` or `[n, j]` of a matrix that has changed a little. Noise is added
            and at least 6 products are made, so that an eigenvector that has overtaken them is found.
        generator: of the random start or noise (on the CPU).
        device: of the vectors.
        dtype: of the vectors.

    Returns:
        The eigenpairs; `converged` tells whether the tolerance was met. Of a repeated eigenvalue one copy is
        found until the basis spans an invariant space.

    Raises:
        ValueError: if k or `iterations` are out of range, `which` is unknown, the start does not fit, or a
            product is not finite.

    Reference:
        Lanczos 1950; Parlett, "The Symmetric Eigenvalue Problem", 1980, chapter 13.
    """
    if not 1 <= k <= n:
        raise ValueError(f"expected k between 1 and {n}, got {k}")
    if which not in ("largest", "smallest", "magnitude", "both"):
        raise ValueError(f"expected which to be largest, smallest, magnitude or both, got {which!r}")
    most = min(n, max(20 * k, 100) if iterations is None else iterations)
    if most < k:
        raise ValueError(f"expected at least {k} iterations for {k} eigenvalues, got {iterations}")
    least = k if start is None else min(max(k, _WARM_PRODUCTS), most)
    krylov = _Krylov(product, _start(start, torch.empty(n, device=device, dtype=dtype), generator), generator)
    while True:
        krylov.grow()
        if krylov.size < least:
            continue
        values, ritz, residuals = krylov.ritz()
        chosen = _choose(values, which, k)
        converged = bool((residuals[chosen] <= tolerance * values.abs().max()).all())
        if converged or krylov.size == most:
            break
    vectors = krylov.basis[: krylov.size].T @ ritz[:, chosen].to(krylov.basis)
    found = values[chosen].to(vectors), vectors, residuals[chosen].to(vectors)
    return Eigen(*found, products=krylov.size, converged=converged)


def _random(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Drawn on the CPU, so that a seed gives the same start on every device.
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _start(start: Tensor | None, like: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = _random(like, generator)
    if start is None:
        return noise
    if start.dim() not in (1, 2) or len(start) != len(like):
        raise ValueError(f"expected a start of {len(like)} rows, got shape {tuple(start.shape)}")
    warm = start.detach().to(like).reshape(len(like), -1).sum(1)
    if not (warm.isfinite().all() and warm.norm() > 0):
        raise ValueError("expected a start that is finite and not zero")
    return warm / warm.norm() + _NOISE * noise / noise.norm()


def _choose(values: Tensor, which: Which, k: int) -> Tensor:
    """Indices of the wanted values among values in ascending order, largest first."""
    m = len(values)
    if which == "magnitude":
        return values.abs().argsort(descending=True)[:k]
    low = {"largest": 0, "smallest": k, "both": k // 2}[which]
    return torch.tensor([*range(m - 1, m - 1 - (k - low), -1), *range(low - 1, -1, -1)], dtype=torch.long)


def hessian_eigenvalues(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Data,
    k: int = 1,
    *,
    batch_size: int | None = None,
    which: Which = "largest",
    iterations: int | None = None,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigen:
    """Extreme eigenvalues of the Hessian of the mean loss; the largest is the sharpness.

    Args:
        model: see `Hessian`.
        loss: likewise.
        data: likewise.
        k: how many.
        batch_size: see `Hessian`.
        which: see `lanczos`.
        iterations: likewise.
        tolerance: likewise.
        start: the `vectors` of an earlier measurement: along training this saves most of the products.
        generator: see `lanczos`.

    Returns:
        The eigenpairs; `Hessian(model, loss, data).split(vector)` gives a vector by parameter name.
    """
    hessian = Hessian(model, loss, data, batch_size=batch_size)
    return lanczos(
        hessian,
        hessian.n,
        k,
        which=which,
        iterations=iterations,
        tolerance=tolerance,
        start=start,
        generator=generator,
        device=hessian.device,
        dtype=hessian.dtype,
    )


class Trace(NamedTuple):
    """An estimated trace.

    Attributes:
        value: the estimate.
        standard_error: of the estimate; zero for a diagonal matrix.
        samples: how many random vectors it took.
    """

    value: float
    standard_error: float
    samples: int


def hutchinson_trace(
    product: Product,
    n: int,
    *,
    samples: int = 64,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Trace:
    """Trace of a matrix known by its products: $\\operatorname{tr} A = \\mathbb{E}[z^\\top A z]$ over random
    signs $z$.

    The variance of one sample is $2 \\sum_{i \\ne j} A_{ij}^2$ for a symmetric matrix. The matrix need not be
    symmetric: a Jacobian's trace, a divergence, is found the same way.

    Args:
        product: $v \\mapsto A v$ on vectors `[n]`.
        n: size of the matrix.
        samples: most random vectors.
        tolerance: stop when the standard error is below this times the estimate, after at least 8 samples.
        generator: of the signs (on the CPU).
        device: of the vectors.
        dtype: of the vectors.

    Raises:
        ValueError: if there are fewer than 2 samples.

    Reference:
        Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1989.
    """
    like = torch.empty(n, device=device, dtype=dtype)
    draws = _hutchinson(lambda z: (z * product(z)).double().sum()[None], like, samples, tolerance, generator)
    return _trace(draws[:, 0])


def hessian_traces(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Data,
    *,
    batch_size: int | None = None,
    samples: int = 64,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Trace]:
    """Trace of every parameter's diagonal block of the Hessian of the mean loss, all from the same products.

    With $z = (z_1, …)$ over the parameters, $\\mathbb{E}[z_p^\\top (H z)_p] = \\operatorname{tr} H_{pp}$.
    Their sum is the trace of the Hessian.

    Args:
        model: see `Hessian`.
        loss: likewise.
        data: likewise.
        batch_size: likewise.
        samples: most random vectors.
        tolerance: stop when every parameter's standard error is below this times its estimate.
        generator: of the signs.

    Returns:
        The estimate by parameter name; divide by the parameter's `numel()` for the mean curvature.

    Reference:
        Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020.
    """
    hessian = Hessian(model, loss, data, batch_size=batch_size)

    def blocks(z: Tensor) -> Tensor:
        return torch.stack([t.double().sum() for t in hessian.split(z * hessian(z)).values()])

    like = torch.empty(hessian.n, device=hessian.device, dtype=hessian.dtype)
    draws = _hutchinson(blocks, like, samples, tolerance, generator)
    return {name: _trace(draws[:, i]) for i, name in enumerate(hessian.names)}


def _hutchinson(
    sample: Callable[[Tensor], Tensor],
    like: Tensor,
    samples: int,
    tolerance: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws `[samples, traces]` of one or several traces at once."""
    if samples < 2:
        raise ValueError(f"expected at least 2 samples, got {samples}")
    draws: list[Tensor] = []
    while len(draws) < samples:
        signs = torch.randint(2, like.shape, generator=generator) * 2 - 1
        draws.append(sample(signs.to(like)).cpu())
        if tolerance is not None and len(draws) >= 8:
            drawn = torch.stack(draws)
            error = drawn.std(0) / len(draws) ** 0.5
            if (error <= tolerance * drawn.mean(0).abs()).all():
                break
    return torch.stack(draws)


def _trace(draws: Tensor) -> Trace:
    return Trace(draws.mean().item(), draws.std().item() / len(draws) ** 0.5, len(draws))
