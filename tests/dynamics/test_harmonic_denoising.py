"""Homogeneity, Jacobians against autograd, known optima, the sampler, images, errors."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.dynamics import (
    BiasFreeBatchNorm2d,
    BiasFreeCNN,
    BiasFreeUNet,
    Measurement,
    agreement,
    c_alpha_images,
    disc_images,
    draw_images,
    empirical_denoiser,
    generalization_test,
    harmonic_basis,
    homogeneity,
    jacobian,
    make_bias_free,
    nearest_training,
    remove_repeats,
    shuffle_pixels,
    sure,
    train_denoiser,
)
from torchfolio.dynamics.harmonic_denoising import BlindDenoising, denoise, psnr
from torchfolio.models import ConvNet, UNet


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images():
    return c_alpha_images(80, 16, seed=3)


@pytest.fixture(scope="module")
def trained(images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = BiasFreeUNet(1, 4, 2)
        before = torch.get_rng_state()
        train_denoiser(net, images, 60, batch_size=16, lr=3e-3)
        assert torch.equal(before, torch.get_rng_state())
    return net


def test_the_denoiser_scales_and_is_its_jacobian_times_the_image(trained, images):
    y = images[:4] + 0.25 * draw(4, 1, 16, 16)
    assert max(homogeneity(trained, y, factor) for factor in (0.1, 3.0)) <= 1e-5
    denoised = denoise(trained, y)[0].flatten()
    matrix = jacobian(trained, y[0], chunk=50)
    assert float((matrix @ y[0].flatten() - denoised).norm() / denoised.norm()) <= 1e-4
    exact = torch.autograd.functional.jacobian(lambda x: (x - trained(x[None])[0]).flatten(), y[0]).reshape(256, 256)
    assert torch.allclose(matrix, exact, atol=1e-5)
    assert torch.equal(jacobian(lambda x: x - trained(x), y[0], returns="denoised"), jacobian(trained, y[0]))
    basis = harmonic_basis(trained, y[0])
    assert torch.allclose(basis.eigenvectors.flatten(1) @ basis.eigenvectors.flatten(1).T, torch.eye(256), atol=1e-4)
    assert basis.trace == pytest.approx(float(matrix.trace()), rel=1e-4)
    assert basis.asymmetry == pytest.approx(float((matrix - matrix.T).norm() / (matrix + matrix.T).norm()), rel=1e-3)
    factors, error = basis.oracle_shrinkage(images[0], 0.25)
    power = (basis.eigenvectors.flatten(1) @ images[0].flatten()).square()
    assert torch.allclose(factors, power / (power + 0.0625))
    # The mean squared error of a fixed diagonal shrinkage: bias and variance of each coefficient.
    assert error == pytest.approx(float(((1 - factors) ** 2 * power + factors**2 * 0.0625).sum()), rel=1e-4)


def wiener(side=18, sigma=0.3):
    """The best denoiser of Gaussian images of a known covariance, with a few strong directions, and its error."""
    d = side * side
    basis = torch.linalg.qr(draw(d, d, dtype=torch.float64))[0]
    variances = 2.0 / (1 + torch.arange(d, dtype=torch.float64)) ** 1.5
    gain = (basis * (variances / (variances + sigma**2))) @ basis.T
    error = float((variances * sigma**2 / (variances + sigma**2)).sum())
    return lambda y: (y.flatten(1) @ gain.T).reshape(y.shape), variances, error, basis


def test_the_wiener_filter_has_a_symmetric_jacobian_whose_trace_is_its_error():
    denoiser, variances, error, eigenvectors = wiener()
    y = draw(1, 18, 18, dtype=torch.float64)
    basis = harmonic_basis(denoiser, y, returns="denoised")
    assert basis.asymmetry <= 1e-6
    assert 0.09 * basis.trace == pytest.approx(error, rel=1e-6)
    assert torch.allclose(basis.eigenvalues, variances / (variances + 0.09), atol=1e-8)
    few = harmonic_basis(denoiser, y, 5, returns="denoised")
    assert torch.allclose(few.eigenvalues, basis.eigenvalues[:5], atol=1e-6)
    assert torch.allclose((few.eigenvectors.flatten(1) @ eigenvectors[:, :5]).abs(), torch.eye(5).double(), atol=1e-3)
    assert few.asymmetry <= 1e-6
    x = (eigenvectors * variances.sqrt()) @ draw(324, 500, dtype=torch.float64)
    x = x.T.reshape(-1, 1, 18, 18)
    noisy = x + 0.3 * draw(500, 1, 18, 18, seed=1, dtype=torch.float64)
    true = (denoiser(noisy) - x).square().flatten(1).sum(1).mean()
    assert true == pytest.approx(error, rel=0.06)
    assert sure(denoiser, noisy, 0.3, probes=4, returns="denoised").mean() == pytest.approx(float(true), rel=0.06)
    exact = sure(denoiser, noisy[:2], 0.3, probes=None, returns="denoised")
    assert torch.allclose(exact, sure(denoiser, noisy[:2], 0.3, probes=800, returns="denoised"), rtol=0.02)


def test_sure_of_a_network_and_its_probes(trained, images):
    y = images + 0.25 * draw(*images.shape)
    true = (denoise(trained, y) - images).square().flatten(1).sum(1).mean()
    assert sure(trained, y, 0.25, probes=16).mean() == pytest.approx(float(true), rel=0.06)
    exact, probed = (sure(trained, y[:3], 0.25, probes=p) for p in (None, 400))
    assert torch.allclose(exact, probed, rtol=0.1)


def test_the_norm_divides_and_subtracts_nothing():
    norm = BiasFreeBatchNorm2d(3).double()
    x = draw(6, 3, 5, 5, dtype=torch.float64) + 2.0
    expected = 0.5 * x / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm(x), expected)
    assert torch.allclose(norm.running_sd, 0.9 + 0.1 * (x.var((0, 2, 3), correction=0) + 1e-5).sqrt())
    norm.eval()
    assert torch.allclose(norm(x), 0.5 * x / norm.running_sd[:, None, None])
    assert torch.autograd.gradcheck(norm.train(), draw(2, 3, 2, 2, dtype=torch.float64).requires_grad_())
    again = pickle.loads(pickle.dumps(copy.deepcopy(norm)))
    assert torch.equal(again.eval()(x), norm.eval()(x))
    assert norm.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_networks_of_the_paper():
    assert sum(p.numel() for p in BiasFreeUNet().parameters()) == pytest.approx(7.6e6, rel=0.02)
    assert not any(
        "bias" in name
        for name, _ in [*BiasFreeUNet(3, 8, 1).named_parameters(), *BiasFreeCNN(1, 8, 4).named_parameters()]
    )
    for net, shape in ((BiasFreeCNN(3, 8, 5), (2, 3, 7, 9)), (BiasFreeUNet(3, 4, 1).double(), (1, 3, 6, 4))):
        y = draw(*shape).to(next(net.parameters()).dtype)
        assert homogeneity(net, y) == 0 or isinstance(net, BiasFreeCNN), "a new one sees no noise"
        for p in net.parameters():
            nn.init.normal_(p)
        assert net(y).shape == shape
        assert homogeneity(net, y) < 1e-5
    with pytest.raises(ValueError, match="multiples of 4"):
        BiasFreeUNet(1, 4, 2)(draw(1, 1, 6, 8))


class Curved(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def test_a_network_of_ones_own_becomes_bias_free_or_is_refused_by_name():
    own = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 1, 3, padding=1)
    )
    own(draw(20, 1, 8, 8) + 1)
    before = copy.deepcopy(own.state_dict())
    y = draw(3, 1, 8, 8)
    free = make_bias_free(own, y)
    assert homogeneity(free, y) < 1e-5 < 1e-2 < homogeneity(own, y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), own.state_dict().values(), strict=True))
    assert torch.equal(free[0].weight, own[0].weight)
    assert torch.allclose(free[1].running_sd, (own[1].running_var + 1e-5).sqrt())
    jacobian(free.eval(), y[0])
    assert homogeneity(make_bias_free(ConvNet(10, 1, (4, 8))), draw(2, 1, 16, 16)) < 1e-5
    for bad, name in ((UNet(1, widths=(8, 16)), "norm1"), (nn.Sequential(nn.Linear(2, 2), nn.GELU()), "1 .GELU."),
                      (nn.Sequential(nn.LayerNorm(4)), "LayerNorm")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            make_bias_free(bad)
    hidden = nn.Sequential(nn.Conv2d(1, 1, 1), Curved())
    make_bias_free(hidden)
    with pytest.raises(ValueError, match=r"1 \(Curved\)"):
        make_bias_free(hidden, y)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * x

    with pytest.raises(ValueError, match="example="):
        make_bias_free(nn.Sequential(Own()))
    make_bias_free(nn.Sequential(Own()), y)


def test_training_takes_as_many_steps_whatever_the_number_of_images(images):
    seen = []
    for part in (images[:2], images):
        net = BiasFreeCNN(1, 4, 3)
        seen.append(train_denoiser(net, part, 7, batch_size=16).steps)
    assert seen == [7, 7]
    for wrong in (images * 300, images[0], images * float("nan")):
        with pytest.raises(ValueError, match="expected"):
            train_denoiser(BiasFreeCNN(1, 4, 3), wrong, 1)
    with pytest.raises(ValueError, match="rising"):
        BlindDenoising(sigma_range=(0.5, 0.5))
    with pytest.raises(ValueError, match="noise"):
        BlindDenoising("cubic")


def test_agreement_nearest_images_and_repeats(trained, images):
    correlation, ratio = agreement(trained, copy.deepcopy(trained), images[:5])
    assert correlation == pytest.approx(1)
    assert ratio > 100
    assert psnr(images, images + 0.1) == pytest.approx(20, abs=1e-4)
    values, index = nearest_training(0.5 * images[[7, 3]] + 0.2, images, chunk=5)
    assert index.tolist() == [7, 3]
    assert torch.allclose(values, torch.ones(2), atol=1e-5)
    doubled = torch.cat([images[:6], 1 - images[2:4], images[:1] + 0.001 * draw(1, 1, 16, 16)])
    kept = remove_repeats(doubled, threshold=0.9999, chunk=4)
    assert kept.tolist() == [0, 1, 2, 3, 4, 5]
    report = generalization_test(lambda: BiasFreeCNN(1, 4, 3), images[:40], images[40:50], (2, 20), steps=4)
    assert list(report.to_frame()["n"]) == [2, 2, 20, 20]
    assert report.plot() is not None
    with pytest.raises(ValueError, match="disjoint"):
        generalization_test(lambda: BiasFreeCNN(1, 4, 3), images[:40], images[:5], (4,), steps=1)
    with pytest.raises(ValueError, match="sizes"):
        generalization_test(lambda: BiasFreeCNN(1, 4, 3), images[:40], images[40:], (21,), steps=1)


def test_the_empirical_denoiser_of_one_image_returns_it(images):
    one = empirical_denoiser(images[:1])
    assert torch.allclose(one(draw(3, 1, 16, 16), 0.5), images[:1].expand(3, -1, -1, -1))
    several = empirical_denoiser(images)
    assert torch.allclose(several(images[:4] + 0.01 * draw(4, 1, 16, 16), 0.01), images[:4], atol=1e-5)


class Prior(nn.Module):
    """The noise seen by the best blind denoiser of one image, whose level it must guess: all that is not the image."""

    def __init__(self, image):
        super().__init__()
        self.image = nn.Parameter(image)

    def forward(self, y):
        return y - self.image


def test_the_sampler_finds_the_image_each_in_its_own_time_and_keeps_to_measurements():
    image = disc_images(1, 8)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_images(Prior(image[0]), (1, 8, 8), 5, h0=0.05, generator=generator)
    assert bool(drawn.converged.all())
    assert torch.allclose(drawn.images, image.expand(5, -1, -1, -1), atol=1e-5)
    for k in range(5):
        path = drawn.sigmas[: drawn.steps[k], k]
        assert path[-1] <= 0.01 < path[-2]
        assert bool(drawn.sigmas[drawn.steps[k] :, k].isnan().all())
    alone = draw_images(Prior(image[0]), (1, 8, 8), 5, h0=0.05, generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone.images, drawn.images)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    other = 1 - image[0]
    measured = draw_images(Prior(image[0]), (1, 8, 8), 2, h0=0.05, beta=0.5, sigma_end=0.3,
                           measurement=Measurement(lambda x: mask * x, mask * other), max_steps=300)  # fmt: skip
    assert measured.sigmas.nanmean(1)[-1] < measured.sigmas.nanmean(1)[0]
    with pytest.warns(UserWarning, match="2 of 2"):
        draw_images(Prior(image[0]), (1, 8, 8), 2, max_steps=3)
    for wrong in ({"h0": 0.0}, {"beta": 2.0}, {"sigma_end": 2.0}, {"n": 0}, {"max_steps": 0}):
        with pytest.raises(ValueError, match="expected"):
            draw_images(Prior(image[0]), (1, 8, 8), **wrong)


def test_synthetic_images():
    x = c_alpha_images(40, 32, 2.0, seed=1)
    assert x.shape == (40, 1, 32, 32)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    assert torch.equal(x, c_alpha_images(40, 32, 2.0, seed=1))
    rough, smooth = (c_alpha_images(200, 32, alpha).diff(dim=3).abs().median() for alpha in (0.5, 3.0))
    assert smooth < rough
    discs = disc_images(300, 24)
    assert discs.shape == (300, 1, 24, 24)
    assert 0 <= float(discs.min()) < float(discs.max()) <= 1
    shuffled = shuffle_pixels(x, seed=4)
    assert torch.equal(shuffled.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    flat, moved = x.flatten(1), shuffled.flatten(1)
    assert torch.allclose(flat @ flat.T, moved @ moved.T, rtol=1e-4)
    with pytest.raises(ValueError, match="size"):
        c_alpha_images(2, 3)


def test_what_cannot_be_analysed_is_refused(trained):
    net = BiasFreeCNN(1, 4, 3)
    with pytest.raises(ValueError, match="training mode"):
        jacobian(net, draw(1, 8, 8))
    net.eval()
    for wrong in (draw(2, 1, 8, 8), draw(8, 8), draw(1, 8, 8) * float("nan")):
        with pytest.raises(ValueError, match="expected"):
            harmonic_basis(net, wrong)
    with pytest.raises(ValueError, match="returns"):
        jacobian(net, draw(1, 8, 8), returns="image")
    with pytest.raises(ValueError, match="k"):
        harmonic_basis(net, draw(1, 8, 8), 65)
    with pytest.raises(ValueError, match="shape"):
        denoise(nn.Conv2d(1, 2, 1), draw(1, 1, 8, 8))
    with pytest.raises(ValueError, match="sigma"):
        sure(net, draw(1, 1, 8, 8), -1.0)
    inplace = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU(inplace=True)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jacobian(inplace, draw(1, 4, 4))
    assert inplace[1].inplace
    assert F.relu(draw(2)).shape == (2,)
