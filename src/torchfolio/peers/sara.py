"""Steps of fine-tuning, against AdamW and LoRA; and the subgradient of the nuclear norm against autograd's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfolio.adaptation.sara import SaRA, nuclear_gradient
from torchfolio.dynamics.diffusion import MLPDenoiser, noise_prediction_loss
from torchfolio.experiments._half_denoisers import schedule
from torchfolio.experiments._lora import with_lora


def peers(bench: Any) -> None:
    x, plan = torch.randn(64, 1, 8, 8), schedule(200)

    def steps(way: str) -> Any:
        torch.manual_seed(0)
        net = MLPDenoiser((1, 8, 8), 192, 4)
        net = with_lora(net, 8) if way == "lora" else net
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = SaRA(net, fraction=0.1, lr=1e-3) if way == "sara" else torch.optim.AdamW(trained)

        def go() -> None:
            for _ in range(20):
                optimizer.zero_grad()
                noise_prediction_loss(net, plan, x).mean().backward()
                optimizer.step()

        return go

    bench.compare("20 steps of a denoiser", ours=steps("sara"), adamw=steps("adamw"), lora=steps("lora"))
    matrix = torch.randn(192, 192)

    def autograd() -> Tensor:
        leaf = matrix.clone().requires_grad_()
        return torch.autograd.grad(torch.linalg.matrix_norm(leaf, "nuc"), leaf)[0]

    bench.compare("nuclear norm of 192 x 192", ours=lambda: nuclear_gradient(matrix), autograd=autograd)
