"""Rows of the Jacobian of an 80 x 80 image, and its leading eigenpairs, against a loop over pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.dynamics.bias_free import BiasFreeUNet
from torchfolio.dynamics.denoiser_jacobian import harmonic_basis
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    net = BiasFreeUNet(1, 8, 2).eval().requires_grad_(False)
    y = torch.rand(1, 80, 80)
    rows = torch.eye(6400)[3000:3256].reshape(-1, 1, 80, 80)

    def loop() -> Tensor:
        leaf = y[None].clone().requires_grad_()
        output = (leaf - net(leaf)).flatten()
        return torch.stack(
            [torch.autograd.grad(output[k], leaf, retain_graph=True)[0].flatten() for k in range(3000, 3256)]
        )

    def chunks() -> Tensor:
        from torchfolio.dynamics.denoiser_jacobian import _Products

        return _Products(lambda x: x - net(x), y, 16).left(rows)

    bench.compare("256 of the 6,400 rows of a Jacobian", ours=chunks, loop=loop)
    small = F.avg_pool2d(y, 2)
    bench.compare(
        "16 leading eigenpairs of an image of 40 x 40 (peer: the whole Jacobian)",
        ours=lambda: harmonic_basis(net, small, 16),
        whole=lambda: harmonic_basis(net, small),
        repeats=3,
    )
