r"""The Jacobian of a denoiser at an image: its rows, its eigenvectors, its trace, without a loop over pixels.

Networks treat the images of a batch independently in evaluation mode, so that one backward pass of a batch of copies
gives as many rows.

Reference:
    Kadkhodaie, Guth, Simoncelli, Mallat, ICLR 2024, arXiv 2310.02557, section 3.1 (shrinkage) and appendix B (SURE).
    Musco, Musco, "Randomized Block Krylov Methods", NeurIPS 2015, algorithm 2 (few eigenvectors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.checks import finite, positive, whole
from torchfolio.dynamics.blind_sampler import predicted_noise
from torchfolio.engine import evaluating
from torchfolio.shown import Shown

__all__ = ["HarmonicBasis", "harmonic_basis", "jacobian", "sure"]

OVERSAMPLING = 8  # directions beyond those asked for
ROUNDS = 8  # blocks of the Krylov space
PROBES = 16  # of trace and asymmetry where the Jacobian is not formed


@dataclass(frozen=True, repr=False)
class HarmonicBasis(Shown):
    r"""Eigenpairs of the symmetric part of a denoiser's Jacobian at an image.

    Attributes:
        eigenvalues: shrinkage factors `[k]`, largest first.
        eigenvectors: basis images `[k, C, H, W]`, orthonormal.
        asymmetry: $\lVert J - J^\top \rVert_F / \lVert J + J^\top \rVert_F$, 0 for the best denoiser.
        trace: trace of the Jacobian, its effective dimension; an estimate where few eigenpairs were asked for.
        denoised: $f(y)$, `[C, H, W]`.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    asymmetry: float
    trace: float
    denoised: Tensor

    def coefficients(self, x: Tensor) -> Tensor:
        r"""$\langle x, e_k \rangle$ of an image `[C, H, W]`, `[k]`."""
        return self.eigenvectors.flatten(1) @ x.flatten()

    def oracle_shrinkage(self, x: Tensor, sigma: float) -> tuple[Tensor, float]:
        r"""The best factors in this basis for a clean image, $\langle x, e_k \rangle^2 / (\langle x, e_k \rangle^2 +
        \sigma^2)$, and their mean squared error $\sigma^2 \sum_k \lambda^*_k$, summed over pixels.
        """
        power = self.coefficients(x).square()
        factors = power / (power + positive("sigma", sigma) ** 2)
        return factors, float(sigma**2 * factors.sum())


@contextmanager
def _still(denoiser: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In evaluation mode and without activations in place, which derivatives of copies do not bear."""
    if not isinstance(denoiser, nn.Module):
        yield
        return
    if denoiser.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) or hasattr(m, "running_sd")
                                 for m in denoiser.modules()):  # fmt: skip
        raise ValueError(
            "the network is in training mode, where the images of a batch depend on each other; call eval()"
        )
    changed = [module for module in denoiser.modules() if getattr(module, "inplace", False) is True]
    try:
        for module in changed:
            module.inplace = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        with evaluating(denoiser):
            yield
    finally:
        for module in changed:
            module.inplace = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


class _Products:
    """Products of vectors `[m, *shape]` with the transposed Jacobian and with the Jacobian at one image, in chunks."""

    def __init__(self, f: Callable[[Tensor], Tensor], y: Tensor, chunk: int) -> None:
        self.f, self.y, self.chunk = f, y, chunk
        self._graph: tuple[Tensor, Tensor] | None = None

    def left(self, vectors: Tensor) -> Tensor:
        r"""$J^\top v$ of each vector, one backward pass a chunk through one graph of copies."""
        count = min(self.chunk, len(vectors))
        if self._graph is None or len(self._graph[0]) < count:
            with torch.enable_grad():
                copies = self.y.expand(count, *self.y.shape).clone().requires_grad_()
                self._graph = copies, self.f(copies)
        copies, outputs = self._graph
        products = []
        for part in vectors.split(len(copies)):
            full = (
                part
                if len(part) == len(copies)
                else torch.cat([part, part.new_zeros(len(copies) - len(part), *part.shape[1:])])
            )
            (product,) = torch.autograd.grad(outputs, copies, full, retain_graph=True)
            products.append(product[: len(part)])
        return torch.cat(products)

    def right(self, vectors: Tensor) -> Tensor:
        r"""$J v$ of each vector, forward."""
        parts = []
        for part in vectors.split(self.chunk):
            copies = self.y.expand_as(part).contiguous()
            parts.append(torch.func.jvp(self.f, (copies,), (part,))[1].detach())
        return torch.cat(parts)


def _image(denoiser: Callable[[Tensor], Tensor], y: Tensor, returns: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    if not isinstance(y, Tensor) or y.dim() not in (3, 4) or (y.dim() == 4 and len(y) != 1):
        raise ValueError(
            f"expected one image [C, H, W], got {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}"
        )
    finite("y", y)
    return lambda x: x - predicted_noise(denoiser, x, returns), y.detach().reshape(y.shape[-3:])


def _chunk(chunk: int | None, y: Tensor) -> int:
    return (16 if y.device.type == "cpu" else 256) if chunk is None else whole("chunk", chunk, 1)


def jacobian(
    denoiser: Callable[[Tensor], Tensor], y: Tensor, *, chunk: int | None = None, returns: str = "noise"
) -> Tensor:
    r"""$\partial f_i / \partial y_j$ at an image, `[d, d]`.

    Args:
        denoiser: network or function from noisy images to the noise or the image.
        y: noisy image `[C, H, W]`.
        chunk: rows of one backward pass; by default 16 on a CPU, where more do not fit its cache, and 256 elsewhere.
        returns: whether the denoiser returns the `"noise"` or the image, `"denoised"`.

    Raises:
        ValueError: if y is not one image, or the network is in training mode with norms of batches.
    """
    f, y = _image(denoiser, y, returns)
    d = y.numel()
    with _still(denoiser):
        chunk = min(_chunk(chunk, y), d)
        products, rows = _Products(f, y, chunk), []
        for start in range(0, d, chunk):
            index = torch.arange(start, min(start + chunk, d), device=y.device)
            unit = torch.zeros(len(index), d, dtype=y.dtype, device=y.device)
            unit[torch.arange(len(index)), index] = 1
            rows.append(products.left(unit.reshape(-1, *y.shape)).flatten(1))
    return torch.cat(rows)


def harmonic_basis(
    denoiser: Callable[[Tensor], Tensor],
    y: Tensor,
    k: int | None = None,
    *,
    chunk: int | None = None,
    returns: str = "noise",
    seed: int = 0,
) -> HarmonicBasis:
    """In which basis a denoiser shrinks at an image, and by how much.

    Args:
        denoiser: network or function from noisy images to the noise or the image.
        y: noisy image `[C, H, W]`.
        k: number of eigenpairs, those of largest absolute value; all by default, from the whole Jacobian. Few come
            from products with random vectors alone, trace and asymmetry from 16 probes.
        chunk: products of one pass, as of `jacobian`.
        returns: whether the denoiser returns the `"noise"` or the image, `"denoised"`.
        seed: seed of the random vectors.

    Raises:
        ValueError: as `jacobian` does.
    """
    f, image = _image(denoiser, y, returns)
    with torch.no_grad(), _still(denoiser):
        denoised = f(image[None])[0]
    d = image.numel()
    # From so many eigenpairs on the whole Jacobian takes fewer products.
    if k is None or 2 * ROUNDS * (whole("k", k, 1, d) + OVERSAMPLING) >= d:
        matrix = jacobian(denoiser, y, chunk=chunk, returns=returns)
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
        asymmetry = float((matrix - matrix.T).norm() / (matrix + matrix.T).norm())
        trace = float(matrix.trace())
        if k is not None:
            largest = values.abs().topk(k).indices
            values, vectors = values[largest], vectors[:, largest]
    else:
        values, vectors, asymmetry, trace = _few(denoiser, f, image, k, _chunk(chunk, image), seed)
    order = values.argsort(descending=True)
    return HarmonicBasis(values[order], vectors.T[order].reshape(-1, *image.shape), asymmetry, trace, denoised)


def _few(
    denoiser: Callable[[Tensor], Tensor], f: Callable[[Tensor], Tensor], y: Tensor, k: int, chunk: int, seed: int
) -> tuple[Tensor, Tensor, float, float]:
    """Eigenpairs of largest absolute value from a Krylov space, asymmetry and trace by probes."""
    generator = torch.Generator().manual_seed(seed)
    d, wide = y.numel(), k + OVERSAMPLING
    draw = torch.randn(d, wide, generator=generator, dtype=torch.float64).to(y)
    probes = torch.randn(PROBES, d, generator=generator, dtype=torch.float64).sign().to(y)
    with _still(denoiser):
        products = _Products(f, y, chunk)

        def both(v: Tensor) -> tuple[Tensor, Tensor]:
            rows = v.T.reshape(-1, *y.shape)
            return products.right(rows).flatten(1).T, products.left(rows).flatten(1).T

        # A block Krylov space: with the same products far nearer than the last block alone.
        block, blocks, images = torch.linalg.qr(draw)[0], [], []
        for _ in range(ROUNDS):
            right, left = both(block)
            blocks.append(block)
            images.append(0.5 * (right + left))
            basis, block = torch.cat(blocks, 1), images[-1]
            for _ in range(2):  # once is not orthogonal enough
                block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block)[0]
        basis, image = torch.cat(blocks, 1), torch.cat(images, 1)
        small = basis.T @ image
        values, inner = torch.linalg.eigh(0.5 * (small + small.T))
        right, left = both(probes.T)
    largest = values.abs().topk(k).indices
    asymmetry = float((right - left).norm() / (right + left).norm())
    return values[largest], basis @ inner[:, largest], asymmetry, float((probes.T * right).sum() / PROBES)


def sure(
    denoiser: Callable[[Tensor], Tensor],
    y: Tensor,
    sigma: float,
    *,
    probes: int | None = 4,
    returns: str = "noise",
    seed: int = 0,
    chunk: int = 256,
) -> Tensor:
    r"""Stein's unbiased estimate of the squared error of each image, without the clean ones `[N]`.

    $2\sigma^2 \operatorname{tr} J(y) + \lVert y - f(y) \rVert^2 - \sigma^2 d$, summed over pixels.

    Args:
        denoiser: network or function from noisy images to the noise or the image.
        y: noisy images `[N, C, H, W]`.
        sigma: their noise level.
        probes: random signs of Hutchinson's estimate of the trace; `None` takes the exact trace, by d products an
            image.
        returns: whether the denoiser returns the `"noise"` or the image, `"denoised"`.
        seed: seed of the probes.
        chunk: images of one pass.
    """
    positive("sigma", sigma)
    if y.dim() != 4:
        raise ValueError(f"expected images [N, C, H, W], got shape {tuple(y.shape)}")
    if probes is None:
        traces = [jacobian(denoiser, image, chunk=chunk, returns=returns).trace() for image in y]
        trace = torch.stack(traces)
    else:
        trace = _traces(denoiser, finite("y", y), whole("probes", probes, 1), returns, seed, chunk)
    with torch.no_grad(), _still(denoiser):
        residual = torch.cat([predicted_noise(denoiser, part, returns) for part in y.split(chunk)])
    return 2 * sigma**2 * trace + residual.square().flatten(1).sum(1) - sigma**2 * y[0].numel()


def _traces(
    denoiser: Callable[[Tensor], Tensor], y: Tensor, probes: int, returns: str, seed: int, chunk: int
) -> Tensor:
    generator, traces = torch.Generator().manual_seed(seed), []
    with _still(denoiser):
        for part in y.split(chunk):
            with torch.enable_grad():
                leaf = part.detach().clone().requires_grad_()
                output = leaf - predicted_noise(denoiser, leaf, returns)
            total = torch.zeros(len(part), dtype=y.dtype, device=y.device)
            for _ in range(probes):
                signs = torch.randn(part.shape, generator=generator).sign().to(y)
                (product,) = torch.autograd.grad(output, leaf, signs, retain_graph=True)
                total += (product * signs).flatten(1).sum(1)
            traces.append(total / probes)
    return torch.cat(traces)
