"""Views of images: each image draws for itself, identities where nothing is drawn, gradients through all of it."""

from __future__ import annotations

import pytest
import torch

from torchfolio.data.views import Blur, ColorJitter, Compose, Flip, Grey, ResizedCrop, TwoViews, grey, simclr_views


def images(batch=6, channels=3, side=8, dtype=torch.float64):
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)


def seeded():
    return torch.Generator().manual_seed(1)


OPERATIONS = [ResizedCrop(), Flip(), ColorJitter(), Grey(), Blur(p=1.0), simclr_views(blur=True)]


@pytest.mark.parametrize("operation", OPERATIONS, ids=repr)
def test_shape_dtype_seed_and_draws_of_their_own(operation):
    for dtype in (torch.float32, torch.float64):
        x = images(dtype=dtype)
        out = operation(x, seeded())
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert torch.equal(out, operation(x, seeded()))
    same = images(1).expand(32, -1, -1, -1)
    out = operation(same, seeded())
    assert not torch.equal(out, out[:1].expand_as(out))
    assert operation(images(channels=1), seeded()).shape == (6, 1, 8, 8)
    with pytest.raises(ValueError, match="images"):
        operation(images().to(torch.uint8))


@pytest.mark.parametrize("operation", [ResizedCrop(), Flip(), ColorJitter(bounds=None), Grey(), Blur()], ids=repr)
def test_gradients(operation):
    x = images(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: operation(x, seeded()), x)


def test_identities():
    x = images()
    assert torch.allclose(ResizedCrop((1, 1), (1, 1))(x, seeded()), x)
    assert torch.equal(Flip(1.0)(x), x.flip(-1))
    assert torch.equal(Flip(0.0)(x), x)
    assert torch.allclose(ColorJitter(0, 0, 0, 0, p=1)(x), x)
    assert torch.allclose(Grey(1.0)(x), grey(x).expand_as(x))
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(Blur((1, 1), p=1)(flat, seeded()), flat)


def test_hue_leaves_luma_and_a_whole_turn_leaves_all():
    x = images()
    turned = ColorJitter(0, 0, 0, 0.5, p=1, bounds=None)(x, seeded())
    assert torch.allclose(grey(turned), grey(x), atol=1e-3)
    assert not torch.allclose(turned, x)


def test_crops_have_the_share_of_the_area_that_was_asked_for():
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(64, 64)
    x = ramp.expand(200, 1, 64, 64)
    out = ResizedCrop((0.25, 0.25), (1, 1))(x, seeded())
    width = out[:, 0, 0, -1] - out[:, 0, 0, 0]
    assert torch.allclose(width, torch.full_like(width, 0.5), atol=0.02)


def test_two_views_are_independent():
    first, second = TwoViews(Compose([ResizedCrop(), Flip()]))(images(), seeded())
    assert first.shape == second.shape == images().shape
    assert not torch.allclose(first, second)


def test_arguments_are_checked():
    for bad in (
        lambda: ResizedCrop((0.5, 1.5)), lambda: Flip(float("nan")), lambda: ColorJitter(hue=0.6), lambda: Blur((2, 1))
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()
