"""Kernel and evidence written plainly on whole matrices, and GPyTorch's exact process on the same kernel."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from torchfolio.experiments._evidence_of_processes import by_gpytorch, plainly
from torchfolio.theory.infinite_kernels import nngp
from torchfolio.theory.mixture_process import cholesky
from torchfolio.theory.nngp_scale_mixture import t_evidence


def peers(bench: Any) -> None:
    x = torch.randn(1000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.sin(x[:, 0])
    a, b = (torch.tensor(2.0, dtype=torch.float64) for _ in range(2))

    def ours() -> Tensor:
        with torch.no_grad():
            return t_evidence(y, cholesky(nngp(x, None, "relu", 4, weight_var=2.0, bias_var=0.01), 0.1), a, b)

    rivals = {"plain": lambda: plainly(x, y, a, b)}
    if importlib.util.find_spec("gpytorch") is not None:
        rivals["gpytorch"] = by_gpytorch(x, y)
    bench.compare("kernel and evidence, 1,000 points, 4 layers", ours=ours, **rivals)
