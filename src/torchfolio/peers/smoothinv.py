"""All images and targets at once, against one after another with a smoothed network as it comes."""

from __future__ import annotations

from typing import Any

import torch

from torchfolio.backdoor import AllToOne
from torchfolio.backdoor.smoothinv import SmoothInv
from torchfolio.backdoor.victims import victim
from torchfolio.data import load
from torchfolio.experiments._backdoors import patch


def peers(bench: Any) -> None:
    data = load("mnist10k", normalize=False, val=0, train_size=2000)
    net = victim(data, patch(data.shape), AllToOne(0, 10), rate=0.1, epochs=3, seed=0).model
    images, steps, n, eps, sigma = data.test.tensors[0][:2], 120, 20, 1.0, 0.12
    draw = SmoothInv(sigma, eps, steps, n=n)

    def loop() -> None:
        for image in images:
            for target in range(10):
                delta, v = torch.zeros_like(image), torch.zeros_like(image)
                for _ in range(steps):
                    moved = (image + delta).requires_grad_(True)
                    g = net(moved + sigma * torch.randn(n, *image.shape)).softmax(1).mean(0)[target]
                    (gradient,) = torch.autograd.grad(-g.clamp_min(1e-20).log(), moved)
                    v = 0.9 * v + gradient / gradient.norm().clamp_min(1e-12)
                    delta = (image + delta - eps / 20 * v).clamp(0, 1) - image
                    delta = delta * min(1.0, eps / float(delta.norm()))

    bench.compare(
        "2 images x 10 targets, 120 steps of 20 draws",
        repeats=2,
        ours=lambda: draw.identify_target(net, images, images),
        loop=loop,
    )
