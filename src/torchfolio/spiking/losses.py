"""The loss of one time step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import between, finite, number

__all__ = ["SLTTLoss"]


class SLTTLoss(nn.Module):
    """Cross-entropy of one step's output with a pull of the outputs towards a constant:

    $$\\ell(o, y) = (1 - \\alpha)\\, \\mathrm{CE}(o, y) + \\alpha\\, \\overline{(o - m)^2},$$

    the square averaged over batch and classes. With $m$ the same for every class it regularises the size of the
    outputs; `target="one_hot"` pulls them to the label instead.

    Args:
        alpha: $\\alpha$ in [0, 1].
        target: `"ones"` for $m$ everywhere, `"one_hot"` for $m$ at the label and 0 elsewhere.
        mean: $m$.

    Shapes:
        outputs `[B, C]`, labels `[B]` (those of -100 are left out); a scalar comes out.

    Raises:
        ValueError: on settings out of range, or targets that are not labels.

    Reference:
        Meng et al., ICCV 2023, as in the released training script.
    """

    ignore_index = -100  # as in cross-entropy

    def __init__(self, alpha: float = 0.05, target: Literal["ones", "one_hot"] = "ones", mean: float = 1.0) -> None:
        super().__init__()
        between("alpha", alpha, 0, 1)
        finite("mean", number("mean", mean))
        if target not in ("ones", "one_hot"):
            raise ValueError(f"expected target to be 'ones' or 'one_hot', got {target!r}")
        self.alpha, self.target, self.mean = alpha, target, mean

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point() or output.dim() != 2 or y.dim() != 1:
            raise ValueError(
                f"expected outputs [B, C] and integer labels [B], got {tuple(output.shape)} and {y.dtype} "
                f"{tuple(y.shape)}; pass another loss for other targets"
            )
        if bool((y >= output.shape[1]).any()):
            raise ValueError(f"expected labels from 0 to {output.shape[1] - 1}, got {int(y.max())}")
        entropy = F.cross_entropy(output, y, ignore_index=self.ignore_index)
        if self.alpha == 0:
            return entropy
        counted = (y != self.ignore_index).to(output.dtype)
        if self.target == "ones":
            wanted = torch.full_like(output, self.mean)
        else:
            wanted = self.mean * F.one_hot(y.clamp_min(0), output.shape[1]).to(output.dtype)
        square = (output - wanted).square().mean(1) @ counted / counted.sum()
        return (1 - self.alpha) * entropy + self.alpha * square

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, target={self.target!r}, mean={self.mean}"
