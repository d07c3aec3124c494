"""Train two bias-free denoisers on different smooth images and see whether they agree, and in which basis they shrink."""

import torch
from torch import nn

from torchfolio.dynamics import (
    agreement,
    c_alpha_images,
    draw_images,
    harmonic_basis,
    make_bias_free,
    sure,
    train_denoiser,
)

torch.manual_seed(0)


def network():
    """An ordinary network of one's own, made bias-free."""
    own = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1),
    )  # fmt: skip
    return make_bias_free(own)


images = c_alpha_images(260, size=12, alpha=2.0)
test = images[200:]
noisy = test + 0.2 * torch.randn(test.shape)
a, b = network(), network()
for net, half in ((a, images[:100]), (b, images[100:200])):
    train_denoiser(net, half, 80, batch_size=16, lr=3e-3)
correlation, psnr = agreement(a, b, noisy)
print(f"trained on disjoint images, they agree to {psnr:.1f} dB, correlation {correlation:.2f}")
print(f"squared error an image, estimated without the clean ones: {sure(a, noisy, 0.2).mean():.2f}")

basis = harmonic_basis(a, noisy[0])
print(f"effective dimension {basis.trace:.0f} of {noisy[0].numel()}, largest factors {basis.eigenvalues[:4].tolist()}")
drawn = draw_images(a, (1, 12, 12), 2, mean=0.5, h0=0.1, beta=0.5, sigma_end=0.1, max_steps=60)
print(f"drew {tuple(drawn.images.shape)} in {drawn.steps.tolist()} steps")
