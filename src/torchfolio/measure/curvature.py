"""Second derivatives without the Hessian: products, extreme eigenvalues, the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Several tensors as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`."""
    parts = vector.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


def hvp(loss: Callable[[], Tensor], parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Hessian-vector product $H v$ by differentiating the gradient.

    Args:
        loss: computes the scalar loss.
        parameters: what the Hessian is taken in.
        vector: $v$, as one vector.

    Returns:
        $H v$ as one vector.
    """
    return _products(loss, parameters)(vector)


def _products(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Product:
    """Products with the Hessian of one loss; the gradient's graph is built once and kept."""
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)

    def product(vector: Tensor) -> Tensor:
        parts = unflatten(vector, parameters)
        inner = sum((g * v).sum() for g, v in zip(gradient, parts, strict=True))
        if not (isinstance(inner, Tensor) and inner.requires_grad):  # a linear loss has no curvature
            return torch.zeros_like(vector)
        return flatten(torch.autograd.grad(inner, parameters, retain_graph=True, materialize_grads=True)).detach()

    return product


def hessian_product(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, *, batch_size: int = 512
) -> tuple[Product, int]:
    """Products with the Hessian of the mean loss over a data set, in the model's trainable parameters.

    Args:
        model: the network, used in the mode it is in.
        loss: criterion with mean reduction.
        x: inputs `[N, ...]`.
        y: targets `[N, ...]`.
        batch_size: examples of one graph; the product sums over batches.

    Returns:
        The product and the number of parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    if len(batches) == 1:
        single = _products(lambda: loss(model(x), y), parameters)
        return single, sum(p.numel() for p in parameters)

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for a, b in batches:
            total += len(a) / len(x) * hvp(lambda a=a, b=b: loss(model(a), b), parameters, vector)
        return total

    return product, sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues, largest first, with eigenvectors as columns `[n, k]` and residuals $\\lVert A v - \\lambda v \\rVert$."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def lanczos(
    product: Product,
    n: int,
    k: int = 1,
    *,
    iterations: int | None = None,
    tolerance: float = 1e-5,
    start: Tensor | None = None,
    which: str = "largest",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Eigen:
    """Extreme eigenvalues of a symmetric matrix known by its products, with full reorthogonalisation.

    Args:
        product: $v \\mapsto A v$.
        n: size of the matrix.
        k: how many eigenvalues.
        iterations: most products; `min(n, max(20 k, 50))` by default.
        tolerance: stop when every residual is below this times the largest eigenvalue in magnitude.
        start: first vector, for a warm start from earlier eigenvectors (several columns are summed).
        which: `"largest"`, `"smallest"` (algebraically) or `"magnitude"`.
        generator: of the random start.
        device: of the vectors.
        dtype: of the vectors.

    Raises:
        ValueError: if k is out of range or `which` unknown.
    """
    if not 1 <= k <= n:
        raise ValueError(f"expected k between 1 and {n}, got {k}")
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(f"expected which to be largest, smallest or magnitude, got {which!r}")
    most = min(n, iterations or max(20 * k, 50))
    v = torch.randn(n, generator=generator, dtype=dtype).to(device) if start is None else start.reshape(n, -1).sum(1)
    basis, alphas, betas = [v / v.norm()], [], []
    while True:
        w = product(basis[-1])
        alphas.append(basis[-1] @ w)
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough (Parlett)
            w = w - stacked.T @ (stacked @ w)
        beta = w.norm()
        values, ritz = _tridiagonal(alphas, betas)
        order = _order(values, which)[:k]
        # The last component of a Ritz vector times beta is its residual.
        residuals = (beta.double().cpu() * ritz[-1, order]).abs()
        scale = values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
        converged = len(order) == k and bool((residuals <= tolerance * scale).all())
        if converged or len(alphas) >= most or beta <= torch.finfo(dtype).eps * scale:
            vectors = stacked.T @ ritz[:, order].to(stacked)
            return Eigen(values[order].to(stacked), vectors, residuals.to(stacked))
        betas.append(beta)
        basis.append(w / beta)


def _tridiagonal(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Tensor, Tensor]:
    t = torch.diag(torch.stack(alphas).double().cpu())
    if betas:
        off = torch.stack(betas).double().cpu()
        t = t + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigh(t)


def _order(values: Tensor, which: str) -> Tensor:
    if which == "smallest":
        return values.argsort()
    return (values.abs() if which == "magnitude" else values).argsort(descending=True)


def hessian_eigenvalues(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    k: int = 1,
    *,
    batch_size: int = 512,
    **options: object,
) -> Eigen:
    """Top eigenvalues of the Hessian of the mean loss. See `hessian_product` and `lanczos` for the arguments."""
    product, n = hessian_product(model, loss, x, y, batch_size=batch_size)
    first = next(p for p in model.parameters() if p.requires_grad)
    return lanczos(product, n, k, device=first.device, dtype=first.dtype, **options)  # pyright: ignore[reportArgumentType]


def hutchinson_trace(
    product: Product,
    n: int,
    *,
    samples: int = 32,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Trace of a matrix known by its products, $\\mathbb{E}[z^\\top A z]$ over random signs $z$.

    Returns:
        The estimate and its standard error (zero for a diagonal matrix).
    """
    if samples < 2:
        raise ValueError(f"expected at least 2 samples, got {samples}")
    estimates = []
    for _ in range(samples):
        z = (torch.randint(2, (n,), generator=generator) * 2 - 1).to(device=device, dtype=dtype)
        estimates.append(z @ product(z))
    values = torch.stack(estimates).double()
    return values.mean().item(), (values.std() / samples**0.5).item()
