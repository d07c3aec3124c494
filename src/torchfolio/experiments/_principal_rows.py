"""Rows that a Hebbian rule learns, beside the principal components of the same Gaussian."""

from __future__ import annotations

import torch

from torchfolio.spiking.hlop import HebbianSubspace

__all__ = ["captured_variance"]


def captured_variance(seed: int, batches: int = 400) -> dict[str, float]:
    """Variance that learned rows capture over that of principal components, with ten rows and with five more."""
    generator = torch.Generator().manual_seed(seed)
    values = 10 * 0.8 ** torch.arange(50.0)
    axes = torch.linalg.qr(torch.randn(50, 50, generator=generator))[0]
    lateral, result = HebbianSubspace(50), {}
    for rows, name in ((10, "ten"), (5, "fifteen")):
        lateral.merge()
        lateral.grow(rows, generator)
        for _ in range(batches):
            lateral.update(torch.randn(64, 50, generator=generator) * values.sqrt() @ axes.mT)
        basis = torch.linalg.qr(lateral.basis.mT)[0]
        caught = (values.sqrt()[:, None] * (axes.mT @ basis)).square().sum()
        result |= {
            name: float(caught / values[: len(lateral.basis)].sum()),
            f"{name}_error": lateral.orthonormality_error(),
        }
    return result
