"""The three-layer network without its first stage, and with all layers trained at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.engine import fit
from torchfolio.engine.recipes import adam
from torchfolio.theory.hierarchical_polynomials import (
    HierarchicalPolynomial,
    LayerwiseThreeLayerRegressor,
    ThreeLayerNetwork,
)


class WithoutFirstStage(LayerwiseThreeLayerRegressor):
    """The control: a random feature, on which the second stage is fitted as ever."""

    def _first_stage(self, network: ThreeLayerNetwork, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        u = torch.randn(self.m2, generator=generator, dtype=torch.float64) / math.sqrt(self.m2)
        network.bottleneck.weight.copy_(u)
        network.bottleneck.bias.copy_(-(network.activation(network.inner(x)).mean(0) @ u))


def end_to_end(settings: Any, seed: int) -> dict[str, Any]:
    """The same network, all of its layers by Adam; the best epoch on held-out data."""
    target, n = HierarchicalPolynomial(settings.d, seed=seed), 2 * settings.n[1]
    X, y = (part[:n].float() for part in target.sample(2 * max(settings.n), seed=2 * seed))
    X_test, y_test = (part.float() for part in target.sample(settings.n_test, seed=2 * seed + 1))
    network, held, tried = ThreeLayerNetwork(settings.d, settings.m1, settings.m2), n // 5, []

    def watch(state: Any) -> None:
        if state.epoch_end:
            with torch.no_grad():
                tried.append([float(F.mse_loss(network(a), b)) for a, b in ((X[-held:], y[-held:]), (X_test, y_test))])

    train = X[:-held], y[:-held]
    fit(network, train, epochs=settings.epochs, optimizer=adam(lr=1e-3), callbacks=[watch], seed=seed)
    return {"error": min(tried)[1] / float(y_test.var())}
