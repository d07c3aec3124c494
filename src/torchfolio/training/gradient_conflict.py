"""Whether labels and a teacher pull a classifier in the same direction.

Penghui Yang, Chen-Chen Zong, Sheng-Jun Huang, Lei Feng, Bo An, "Dual-Head Knowledge Distillation: Enhancing Logits
Utilization with an Auxiliary Head", KDD 2025, https://arxiv.org/abs/2411.08937.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import finite
from torchfolio.data import Examples
from torchfolio.measure import untouched
from torchfolio.training.distillation import binary_kl_norm
from torchfolio.training.dual_head import linear_name, products, teacher_logits

__all__ = ["HeadConflict", "etf_deviation", "head_conflict"]


class HeadConflict(NamedTuple):
    """Cosines between the gradients of the loss on labels and that on logits, on one head.

    Attributes:
        head: cosine over weights and bias of the classifier's last layer, mean over batches.
        backbone: cosine over all other parameters.
        batches: number of batches.
    """

    head: float
    backbone: float
    batches: int


def head_conflict(
    model: nn.Module,
    data: Any,
    teacher: nn.Module | None = None,
    *,
    layer: str | None = None,
    tau: float = 2.0,
    batch_size: int = 64,
) -> HeadConflict:
    """How much labels and a teacher's logits pull against each other in a classifier with one head.

    The network is measured in evaluation mode and left as it was.

    Args:
        model: classifier.
        data: whatever `torchfolio.data.Examples` takes with (x, y); (x, teacher logits, y) without a teacher.
        teacher: network with the model's inputs and classes.
        layer: name of the classifier's last layer; the last `nn.Linear` by default.
        tau: temperature of `binary_kl_norm`.
        batch_size: examples of a gradient.

    Returns:
        Mean cosines in [-1, 1]; NaN where one of the gradients is zero.

    Raises:
        ValueError: if the logits do not fit, inputs hold NaN, or no parameter of head or backbone is trained.

    Reference:
        Yang et al., KDD 2025, section 3.
    """
    own = model.get_submodule(linear_name(model, layer))
    head = [p for p in own.parameters() if p.requires_grad]
    inside = {id(p) for p in head}
    backbone = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    if not head or not backbone:
        raise ValueError("expected trained parameters in the last layer and below it")
    cosines: list[Tensor] = []
    with untouched(model, training=False), torch.enable_grad():
        for batch in Examples(data).batches(batch_size, head[0].device):
            logits = model(finite("data", batch[0]))
            losses = F.cross_entropy(logits, batch[-1]), binary_kl_norm(logits, teacher_logits(teacher, batch), tau)
            a, b = (
                torch.autograd.grad(loss, [*head, *backbone], retain_graph=True, materialize_grads=True)
                for loss in losses
            )
            cut = len(head)
            cosines.append(torch.stack([_cosine(a[:cut], b[:cut]), _cosine(a[cut:], b[cut:])]).double().cpu())
    mean = torch.stack(cosines).mean(0).tolist()
    return HeadConflict(mean[0], mean[1], len(cosines))


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    product, square_a, square_b = products(a, b)
    return product / (square_a.sqrt() * square_b.sqrt())


def etf_deviation(weight: Tensor) -> dict[str, float]:
    """How far the rows of a classifier are from a simplex, as which they end in neural collapse.

    Args:
        weight: `[K, d]`, a row for each of at least two classes; centred across classes here.

    Returns:
        `equinorm`, the standard deviation of the rows' lengths over their mean, and `equiangularity`, the mean over
        pairs of $|\\cos(w_k, w_j) + 1/(K - 1)|$; both 0 for a simplex.

    Raises:
        ValueError: if there are no two rows.

    Reference:
        Papyan, Han, Donoho, "Prevalence of neural collapse during the terminal phase of deep learning training",
        PNAS 2020.
    """
    if weight.dim() != 2 or len(weight) < 2:
        raise ValueError(f"expected weights [K, d] of at least two classes, got {tuple(weight.shape)}")
    w = weight.detach().double()
    w = w - w.mean(0)
    norms, count = w.norm(dim=1), len(w)
    cosines = F.normalize(w, dim=1) @ F.normalize(w, dim=1).T
    apart = ~torch.eye(count, dtype=torch.bool, device=w.device)
    return {
        "equinorm": float(norms.std(correction=0) / norms.mean()),
        "equiangularity": float((cosines[apart] + 1 / (count - 1)).abs().mean()),
    }
