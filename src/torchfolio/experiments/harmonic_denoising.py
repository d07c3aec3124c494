"""Measures memorisation and generalisation of blind denoisers of small photographs, and the basis in which they shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.dynamics.bias_free import BiasFreeUNet
from torchfolio.dynamics.blind_sampler import draw_images
from torchfolio.dynamics.geometric_images import shuffle_pixels
from torchfolio.dynamics.harmonic_denoising import denoise, generalization_test, nearest_training, psnr, train_denoiser
from torchfolio.engine import seeded
from torchfolio.experiments._denoiser_jacobians import error_of_sure, shrinkage
from torchfolio.experiments._grey_pictures import pictures
from torchfolio.experiments._homogeneity import errors_of_homogeneity, ordinary
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """Grey images, the network, and its training."""

    data: str = setting("cifar10", "name of the data set")
    image_size: int | None = setting(16, "side of the images")
    pool: int = setting(10_000, "images of which near-copies are removed, train and test images among them")
    sizes: tuple[int, ...] = setting((4, 4000), "numbers of training images of each of two denoisers")
    test: int = setting(1024, "test images")
    base: int = setting(8, "channels of the network at the finest resolution")
    steps: int = setting(400, "number of steps of each training")
    lr: float = setting(4e-3, "learning rate")
    sigmas: tuple[float, ...] = setting((0.1, 0.25, 0.5), "noise levels of the tests")
    draws: int = setting(8, "draws of the noise over which SURE is averaged")
    samples: int = setting(8, "images drawn from both denoisers")


SCALES = {
    "smoke": Settings(data="digits", image_size=None, pool=300, sizes=(4, 60), test=32, steps=20, samples=2),
    "quick": Settings(),
    "full": Settings(image_size=32, pool=45_000, sizes=(4, 64, 1000, 20_000), base=32, steps=8000, samples=32),
}


def regimes(settings: Settings, images: Tensor, test: Tensor, seed: int) -> dict[str, Any]:
    """Two denoisers on disjoint images for each number of them, and what the best one does inside."""
    result = generalization_test(
        lambda: BiasFreeUNet(1, settings.base, 2), images, test, settings.sizes, sigmas=settings.sigmas,
        steps=settings.steps, seed=seed, lr=settings.lr,
    )  # fmt: skip
    values: dict[str, Any] = {"table": [list(row.values()) for row in result.rows]}
    for name, n in (("few", settings.sizes[0]), ("many", settings.sizes[-1])):
        row = result.row(n, settings.sigmas[0])
        values |= {f"{name}_{key}": row[key] for key in ("train_psnr", "test_psnr", "correlation", "psnr_between")}
    values["test_psnr"] = result.row(settings.sizes[-1], settings.sigmas[1])["test_psnr"]
    net, other = result.denoisers[settings.sizes[-1]]
    noise = noise_like(test, seed)
    values |= errors_of_homogeneity(net, test + 0.25 * noise)
    for sigma in settings.sigmas:
        values[f"error_{100 * sigma:.0f}"] = error_of_sure(net, test, sigma, settings.draws, seed)
    values |= shrinkage(net, test[0], noise[0], settings.sigmas)
    return values | drawn(settings, (net, other), images[: settings.sizes[-1]], float(images.mean()), seed)


def drawn(settings: Settings, nets: tuple[nn.Module, ...], train: Tensor, mean: float, seed: int) -> dict[str, Any]:
    """Images that two denoisers draw from equal noise: cosines with each other, and with the nearest training image."""
    samples = [
        draw_images(net, train.shape[1:], settings.samples, mean=mean, h0=0.05, beta=0.1, sigma_end=0.03,
                    max_steps=300, generator=torch.Generator().manual_seed(seed)).images
        for net in nets
    ]  # fmt: skip
    first, second = (F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1) for x in samples)
    return {
        "samples": torch.cat(samples),
        "sample_agreement": (first * second).sum(1).mean(),
        "sample_nearest": nearest_training(samples[0], train)[0].mean(),
    }


def noise_like(test: Tensor, seed: int) -> Tensor:
    """The noise under which the denoisers are tested, the same in all arms."""
    return torch.randn(test.shape, generator=torch.Generator().manual_seed(seed))


def untrained(settings: Settings, seed: int) -> tuple[nn.Module, int]:
    """The network that the first of two denoisers starts from in `generalization_test`, and the seed of its training."""
    with seeded(2 * seed):
        return BiasFreeUNet(1, settings.base, 2), 2 * seed


def shuffled(settings: Settings, images: Tensor, test: Tensor, seed: int) -> dict[str, float]:
    """Test PSNR of a denoiser of images whose pixels are all in one other order."""
    (net, own), sigma = untrained(settings, seed), settings.sigmas[1]
    train_denoiser(net, shuffle_pixels(images[: settings.sizes[-1]]), settings.steps, lr=settings.lr, seed=own)
    noisy = test + sigma * noise_like(test, seed)
    return {"test_psnr": psnr(denoise(net, shuffle_pixels(noisy)), shuffle_pixels(test))}


def control(settings: Settings, images: Tensor, test: Tensor, seed: int) -> dict[str, float]:
    """Errors of homogeneity with biases and ordinary batch norms."""
    start, own = untrained(settings, seed)
    net = ordinary(start, seed)
    train_denoiser(net, images[: settings.sizes[-1]], settings.steps // 4, lr=settings.lr, seed=own)
    return errors_of_homogeneity(net.eval(), test + 0.25 * noise_like(test, seed))


def run(run: Run[Settings]) -> None:
    """Train in both regimes, look inside, then train on shuffled pixels and with biases."""
    given = run.settings, *pictures(run), run.seed
    both = run.arm("regimes", regimes, *given)
    other = run.arm("shuffled", shuffled, *given)
    run.values("negative_control", run.arm("control", control, *given))
    run.values("homogeneity", scaling=both["scaling"], jacobian=both["jacobian"])
    gaps = {name: both[f"{name}_train_psnr"] - both[f"{name}_test_psnr"] for name in ("few", "many")}
    run.values("memorization", gap=gaps["few"], correlation=both["few_correlation"])
    run.values(
        "generalization",
        pick(both, "sample_agreement", "sample_nearest"),
        gap=gaps["many"],
        correlation=both["many_correlation"],
        between=both["many_psnr_between"],
        test=both["many_test_psnr"],
    )
    percents = [f"{100 * sigma:.0f}" for sigma in run.settings.sigmas]
    run.values("sure", pick(both, *(f"error_{percent}" for percent in percents)))
    traces = [f"trace_{percent}" for percent in percents]
    run.values("shrinkage", pick(both, "mass", "asymmetry", "dimension", "oracle_over_mse", *traces))
    run.values("shuffled_pixels", straight=both["test_psnr"], shuffled=other["test_psnr"])


def figures(results: Results) -> plots.Figures:
    """Shrinkage by direction, the directions, and samples of two denoisers."""
    samples, vectors = (results.values("regimes", name)[0] for name in ("samples", "eigenvectors"))
    titles = [name for name in ("one denoiser", "the other") for _ in range(len(samples) // 2)]
    shrinkage = {"shrinkage": ("regimes", "eigenvalues")}
    return {
        "spectrum": plots.curves(results, shrinkage, xlabel="direction", ylabel="factor"),
        "basis": plots.grid(0.5 + vectors / (2 * abs(vectors).max())),
        "samples": plots.grid(samples.clip(0, 1), titles, columns=len(samples) // 2),
    }
