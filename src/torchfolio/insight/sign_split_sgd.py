"""SGD whose large coordinates take steps of a fixed size: the case study of opposing signals.

Reference:
    Rosenfeld, Risteski, ICLR 2024 (arXiv 2311.04163), Section 5; the constants are our reading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from torchfolio.checks import at_least, between, finite

__all__ = ["SignSplitSGD"]


class SignSplitSGD(Optimizer):
    """SGD whose large coordinates take steps of a fixed size: the part of Adam that opposing signals call for.

    $m \\leftarrow \\mu m + (1 - \\tau) g$; coordinates with $|m| \\le r$ move by $-\\eta_1 m$, the others by
    $-\\eta_2 \\operatorname{sign}(m)$. The paper's exact constants are not known to us: these are our reading.

    Args:
        params: parameters or groups.
        lr: $\\eta_1$.
        sign_lr: $\\eta_2$.
        momentum: $\\mu$.
        dampening: $\\tau$.
        quantile: share of coordinates that are large, of the first gradients, which fixes r.
        threshold: r itself, in place of `quantile`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        sign_lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.9,
        quantile: float = 0.1,
        threshold: float | None = None,
    ) -> None:
        at_least("lr", lr, 0)
        at_least("sign_lr", sign_lr, 0)
        between("momentum", momentum, 0, 1)
        between("dampening", dampening, 0, 1)
        between("quantile", quantile, 0, 1)
        if threshold is not None:
            at_least("threshold", threshold, 0)
        defaults = {"lr": lr, "sign_lr": sign_lr, "momentum": momentum, "dampening": dampening, "quantile": quantile,
                    "threshold": threshold}  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if group["threshold"] is None and held:
                sizes = torch.cat([p.grad.abs().flatten().float() for p in held])
                rank = max(1, min(len(sizes), round((1 - group["quantile"]) * len(sizes))))
                group["threshold"] = float(finite("the first gradients", sizes).kthvalue(rank).values)
            for p in held:
                state = self.state[p]
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                m = state["average"].mul_(group["momentum"]).add_(p.grad, alpha=1 - group["dampening"])
                small = m.abs() <= group["threshold"]
                p.sub_(torch.where(small, group["lr"] * m, group["sign_lr"] * m.sign()))
        return loss
