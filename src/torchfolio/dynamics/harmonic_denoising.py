r"""Whether a denoiser memorised or generalised, and in which basis it shrinks noise.

Two denoisers trained on disjoint images must agree if they learned the density and not the images. What one does at a
noisy image y is seen in its Jacobian: with the eigenpairs $(\lambda_k, e_k)$ of its symmetric part a homogeneous
denoiser is a shrinkage $f(y) = \sum_k \lambda_k \langle y, e_k \rangle e_k$, whose basis adapts to the geometry of the
image.

Reference:
    Kadkhodaie, Guth, Simoncelli, Mallat, "Generalization in diffusion models arises from geometry-adaptive harmonic
    representations", ICLR 2024, arXiv 2310.02557, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import between, positive, whole
from torchfolio.checks import images as check_images
from torchfolio.dynamics.bias_free import BiasFreeBatchNorm2d, BiasFreeCNN, BiasFreeUNet, homogeneity, make_bias_free
from torchfolio.dynamics.blind_denoising import BlindDenoising, denoise, train_denoiser
from torchfolio.dynamics.blind_sampler import Measurement, draw_images
from torchfolio.dynamics.denoiser_jacobian import HarmonicBasis, harmonic_basis, jacobian, sure
from torchfolio.dynamics.geometric_images import c_alpha_images, disc_images, shuffle_pixels
from torchfolio.engine import seeded
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "BiasFreeBatchNorm2d",
    "BiasFreeCNN",
    "BiasFreeUNet",
    "BlindDenoising",
    "Generalization",
    "HarmonicBasis",
    "Measurement",
    "agreement",
    "c_alpha_images",
    "denoise",
    "disc_images",
    "draw_images",
    "empirical_denoiser",
    "generalization_test",
    "harmonic_basis",
    "homogeneity",
    "jacobian",
    "make_bias_free",
    "nearest_training",
    "psnr",
    "remove_repeats",
    "shuffle_pixels",
    "sure",
    "train_denoiser",
]


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean peak signal-to-noise ratio between images in [0, 1], in dB."""
    return float((-10 * torch.log10((a - b).square().flatten(1).mean(1).clamp_min(1e-20))).mean())


def _centred(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def agreement(a: nn.Module, b: nn.Module, y: Tensor, *, returns: str = "noise") -> tuple[float, float]:
    """How alike two denoisers denoise: mean correlation of their images, and PSNR between them.

    The mean of each image is taken off first; else all images look alike.

    Args:
        a: network.
        b: network.
        y: noisy images that neither was trained on `[N, C, H, W]`.
        returns: quantity that the networks return.
    """
    first, second = (denoise(net, y, returns=returns) for net in (a, b))
    return float((_centred(first) * _centred(second)).sum(1).mean()), psnr(first, second)


def nearest_training(samples: Tensor, train: Tensor, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The training image that is most like each sample: correlation `[n]`, image means taken off, and index `[n]`.

    Args:
        samples: images `[n, C, H, W]`.
        train: training images `[N, C, H, W]`.
        chunk: training images that are compared at a time.
    """
    if samples.shape[1:] != train.shape[1:]:
        raise ValueError(f"expected images of one shape, got {tuple(samples.shape[1:])} and {tuple(train.shape[1:])}")
    wanted = _centred(samples)
    best = [(wanted @ _centred(part).T).max(1) for part in train.split(chunk)]
    values, winners = torch.stack([v for v, _ in best]).max(0)
    index = torch.stack([i for _, i in best]).gather(0, winners[None])[0] + winners * chunk
    return values, index


def remove_repeats(images: Tensor, *, threshold: float = 0.95, size: int = 20, chunk: int = 1024) -> Tensor:
    """Indices `[M]` of images without those that are nearly an earlier one: near-copies would fake generalisation.

    Args:
        images: `[N, C, H, W]`.
        threshold: absolute correlation, image means taken off, above which the later of two is dropped.
        size: side to which images are averaged down before.
        chunk: images that are compared at a time.
    """
    between("threshold", threshold, 0, 1)
    small = F.adaptive_avg_pool2d(images, (min(size, images.shape[2]), min(size, images.shape[3])))
    unit = _centred(small)
    keep = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for start in range(0, len(images), chunk):
        rows = (unit[start : start + chunk] @ unit[: start + chunk].T).abs() > threshold
        for row, earlier in enumerate(rows.tril(start - 1)):
            if bool(earlier.any()):
                keep[start + row] = not bool((earlier & keep[: len(earlier)]).any())
    return keep.nonzero()[:, 0]


def empirical_denoiser(train: Tensor) -> Callable[[Tensor, float], Tensor]:
    r"""The best denoiser of the training images themselves, which memorises: $\sum_i w_i(y)\, x_i$ with softmax weights.

    Args:
        train: images `[N, C, H, W]`.

    Returns:
        `(y, sigma) -> images`, with $w \propto \exp(-\lVert y - x_i \rVert^2 / 2\sigma^2)$.
    """
    flat = check_images(train, name="train").flatten(1)

    def denoiser(y: Tensor, sigma: float) -> Tensor:
        distances = torch.cdist(y.flatten(1), flat).square()
        return (torch.softmax(-distances / (2 * positive("sigma", sigma) ** 2), 1) @ flat).reshape(y.shape)

    return denoiser


@dataclass(frozen=True, repr=False)
class Generalization(Shown):
    """What `generalization_test` gives: rows of number of images, noise level, PSNR on training and test images,
    correlation and PSNR between the two denoisers; and the denoisers by number of images.
    """

    rows: list[dict[str, float]]
    denoisers: dict[int, tuple[nn.Module, nn.Module]]

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def row(self, n: int, sigma: float) -> dict[str, float]:
        """The row of a number of images and a noise level."""
        return next(row for row in self.rows if row["n"] == n and row["sigma"] == sigma)

    def plot(self) -> Figure:
        """PSNR on training and test images against the number of images, and between the denoisers."""
        import matplotlib.pyplot as plt

        frame = self.to_frame()
        fig, ax = plt.subplots(layout="constrained")
        for k, (sigma, part) in enumerate(frame.groupby("sigma")):
            for name, style in (("train_psnr", "--"), ("test_psnr", "-"), ("psnr_between", ":")):
                ax.plot(part["n"], part[name], style, marker=".", color=f"C{k}", label=f"{name}, σ = {sigma}")
        ax.set(xscale="log", xlabel="training images", ylabel="PSNR (dB)")
        ax.legend(fontsize=7)
        return fig


def generalization_test(
    make_model: Callable[[], nn.Module],
    images: Tensor,
    test: Tensor,
    sizes: Sequence[int],
    *,
    sigmas: Sequence[float] = (0.1, 0.25),
    steps: int = 400,
    seed: int = 0,
    **training: Any,
) -> Generalization:
    """Train two denoisers on disjoint images for each number of images, and see whether they agree.

    The first of them gets the first n images and the second the last n. Weights, noise and order are drawn
    independently. Remove near-copies first, see `remove_repeats`.

    Args:
        make_model: makes a network; random weights come from the global generator, which is seeded.
        images: images to train on `[N, C, H, W]`, in [0, 1].
        test: images of neither set.
        sizes: numbers of images, each at most half of N.
        sigmas: noise levels to test at.
        steps: number of steps of each training.
        seed: seed of everything that is drawn.
        **training: arguments of `train_denoiser`.

    Raises:
        ValueError: if the sets would overlap, or an image is in both halves or in the test images.
    """
    for n in sizes:
        whole("each of sizes", n, 1, len(images) // 2)
    rows, nets = [], {}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(test.shape, generator=generator).to(test)
    for n in sizes:
        halves = images[:n], images[len(images) - n :]
        _check_disjoint(*halves, test)
        pair: list[nn.Module] = []
        for k, half in enumerate(halves):
            with seeded(2 * seed + k):
                net = make_model()
            train_denoiser(net, half, steps, seed=2 * seed + k, **training)
            pair.append(net.eval())
        nets[n] = (pair[0], pair[1])
        for sigma in sigmas:
            own = halves[0][: len(test)]
            y, y_own = test + sigma * noise, own + sigma * noise[: len(own)]
            correlation, between_nets = agreement(pair[0], pair[1], y)
            rows.append({
                "n": n, "sigma": sigma, "train_psnr": psnr(denoise(pair[0], y_own), own),
                "test_psnr": psnr(denoise(pair[0], y), test), "correlation": correlation, "psnr_between": between_nets,
            })  # fmt: skip
    return Generalization(rows, nets)


def _check_disjoint(*sets: Tensor) -> None:
    keys = [{row.numpy().tobytes() for row in part.detach().cpu().contiguous()} for part in sets]
    for k, ours in enumerate(keys):
        for theirs in keys[k + 1 :]:
            if common := ours & theirs:
                raise ValueError(f"expected disjoint sets, got {len(common)} images in two of them; see remove_repeats")
