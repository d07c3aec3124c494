"""The losses of SimCLR, MoCo, SimSiam and Barlow Twins for several heads with a temperature for every pair.

Lei Wang, Piotr Koniusz, Tom Gedeon, Liang Zheng, "Adaptive Multi-head Contrastive Learning", ECCV 2024,
https://arxiv.org/abs/2310.05615.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, finite, one_of, whole
from torchfolio.engine.first_order import first_order
from torchfolio.training.pair_softmax import PairSoftmax
from torchfolio.training.pair_temperature import PairTemperature, temperature_penalty

__all__ = ["AMCLBarlowLoss", "AMCLLoss", "AMCLSimSiamLoss"]

Negatives = Literal["logsumexp", "max", "topk"]


def _projections(*given: Tensor) -> list[Tensor]:
    """Projections of all views in full precision."""
    first = given[0]
    if first.dim() != 3 or first.shape[1] < 2 or any(z.shape != first.shape for z in given):
        shapes = " and ".join(str(tuple(z.shape)) for z in given)
        raise ValueError(f"expected projections [C, N, d] of equal shape with at least two examples, got {shapes}")
    exact = torch.promote_types(first.dtype, torch.float32)
    return [finite("projections", z).to(exact) for z in given]


def _module(temperature: Any) -> Any:
    if not isinstance(temperature, nn.Module):
        raise TypeError(
            f"expected temperature to be a module such as PairTemperature, got {type(temperature).__name__}"
        )
    return temperature


def _fits(temperature: nn.Module) -> bool:
    """Whether the loss and its gradient can be had in one go."""
    return type(temperature) is PairTemperature and temperature.low >= PairSoftmax.LEAST


class AMCLLoss(nn.Module):
    """The loss of SimCLR, and with a queue that of MoCo, with a temperature for every pair and head.

    For an anchor $i$ with its other view $i^+$ and negatives $n$, a sum over heads and a mean over anchors of

    $$-\\frac{s_{ii^+}}{\\tau_{ii^+}} + \\log\\sum_{j \\neq i} e^{s_{ij}/\\tau_{ij}} + \\beta\\Omega(\\tau_{ii^+})
      - \\beta\\,\\frac{1}{|n|}\\sum_n \\Omega(\\tau_{in}),$$

    with $s$ the cosine and $\\Omega$ of `temperature_penalty`. That is this library's soft form, which with one head, a
    fixed temperature and $\\beta = 0$ is exactly NT-Xent. The paper's own, `negatives="max"`, has in place of the
    sum the hardest negative alone (largest $s$, the positive left out), which trained far worse at small scale.

    Args:
        temperature: module from two sets of projections to temperatures, such as `PairTemperature`.
        beta: weight $\\beta$ of the penalty; 1 is the exact likelihood.
        negatives: `"logsumexp"`, `"max"`, or `"topk"` (mean over the `top_k` hardest).
        top_k: number of negatives for `"topk"`.
        detach_temperature: whether temperatures are learnt without a gradient to the projections.

    Attributes:
        stats: means of temperatures and of similarities of positive and negative pairs at the last call, detached.

    Shapes:
        Two views `[C, N, d]`, and a queue `[C, Q, d]` of unit vectors; the result is a scalar.

    Raises:
        TypeError: if `temperature` is no module.
        ValueError: on settings out of range; in the call, on other shapes, values that are not finite, fewer than two
            examples, or fewer negatives than `top_k`.

    Reference:
        Wang et al., ECCV 2024, losses 2.1 and 2.4.
    """

    def __init__(
        self,
        temperature: nn.Module,
        beta: float = 1e-3,
        negatives: Negatives = "logsumexp",
        top_k: int = 1,
        *,
        detach_temperature: bool = False,
    ) -> None:
        super().__init__()
        self.temperature: Any = _module(temperature)
        self.beta = at_least("beta", beta, 0)
        self.negatives = one_of("negatives", negatives, ("logsumexp", "max", "topk"))
        self.top_k, self.detach_temperature = whole("top_k", top_k, 1), detach_temperature
        self.stats: dict[str, Tensor] = {}

    def forward(self, first: Tensor, second: Tensor, queue: Tensor | None = None) -> Tensor:
        """The loss of two views; with a queue, of queries `first` and their keys `second`."""
        with torch.autocast(first.device.type, enabled=False):
            a, b = (F.normalize(z, dim=-1) for z in _projections(first, second))
            if queue is None:
                z, n = torch.cat([a, b], 1), a.shape[1]
                partner = torch.arange(2 * n, device=z.device).roll(n)
                index = partner.expand(len(z), -1).unsqueeze(-1)
                q = self._seen(z)
                if self.negatives == "logsumexp" and _fits(self.temperature):
                    return self._at_once(z, q)
                similarity, tau = z @ z.mT, self.temperature(q, q)
                out = torch.eye(2 * n, dtype=torch.bool, device=z.device)
                return self._loss(similarity, tau, index, out, z.shape[-1])
            if queue.shape[::2] != a.shape[::2] or not queue.shape[1]:
                raise ValueError(f"expected a queue [{len(a)}, Q, {a.shape[2]}] of keys, got {tuple(queue.shape)}")
            keys, q = finite("queue", queue).to(a), self._seen(a)
            similarity = torch.cat([(a * b).sum(-1, keepdim=True), a @ keys.mT], -1)
            tau = torch.cat([self.temperature.paired(q, self._seen(b)).unsqueeze(-1), self.temperature(q, keys)], -1)
            index = torch.zeros(*a.shape[:2], 1, dtype=torch.int64, device=a.device)
            return self._loss(similarity, tau, index, None, a.shape[-1])

    def _at_once(self, z: Tensor, q: Tensor) -> Tensor:
        """The soft form with temperatures of dot products."""
        t = self.temperature
        loss, sums = PairSoftmax.apply(z, t.code(q), t.low, t.high, self.beta)  # pyright: ignore
        anchors = z.shape[0] * z.shape[1]
        means = sums / sums.new_tensor([anchors, anchors * (z.shape[1] - 2)] * 2)
        names = ("positive_temperature", "negative_temperature", "positive_similarity", "negative_similarity")
        self.stats = dict(zip(names, means, strict=True))
        return loss

    def _seen(self, z: Tensor) -> Tensor:
        return z.detach() if self.detach_temperature else z

    def _loss(self, similarity: Tensor, tau: Tensor, index: Tensor, out: Tensor | None, dim: int) -> Tensor:
        """From similarities and temperatures `[C, A, M]`, the positive's place in each row, and pairs to leave out."""
        s, t = similarity.gather(-1, index).squeeze(-1), tau.gather(-1, index).squeeze(-1)
        count = similarity.shape[-1] - 1 - (out is not None)
        self._note(similarity, tau, s, t, out, count)
        if self.negatives == "logsumexp":
            return _Soft.apply(similarity, tau, index, out, self.beta, dim)  # pyright: ignore[reportReturnType]
        k = self.top_k if self.negatives == "topk" else 1
        if k > count:
            raise ValueError(f"expected top_k of at most {count}, the negatives there are, got {k}")
        candidates = similarity.detach().scatter(-1, index, -torch.inf)
        hardest = (candidates if out is None else candidates.masked_fill(out, -torch.inf)).topk(k, -1).indices
        hard_s, hard_t = similarity.gather(-1, hardest), tau.gather(-1, hardest)
        negative = (hard_s / hard_t - self.beta * temperature_penalty(hard_t, dim)).mean(-1)
        terms = self.beta * temperature_penalty(t, dim) - s / t + negative
        return terms.mean(1).sum()

    @torch.no_grad()
    def _note(self, similarity: Tensor, tau: Tensor, s: Tensor, t: Tensor, out: Tensor | None, count: int) -> None:
        for name, whole_, own in (("temperature", tau, t), ("similarity", similarity, s)):
            rest = whole_.sum() - own.sum() - (0 if out is None else whole_.diagonal(dim1=-2, dim2=-1).sum())
            self.stats |= {f"positive_{name}": own.mean(), f"negative_{name}": rest / (own.numel() * count)}


class _Soft(torch.autograd.Function):
    """The soft form from similarities and temperatures, with a gradient written out: half the passes of autograd."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, tau: Tensor, index: Tensor, out: Tensor | None, beta: float, dim: int) -> Tensor:
        inverse = tau.reciprocal()
        p = s * inverse
        own = p.gather(-1, index)
        if out is not None:
            p.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)  # what is left out are the pairs with oneself
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp_().sum(-1, keepdim=True)
        terms = top + total.log() - own
        count = s.shape[-1] - 1 - (out is not None)
        if beta:
            penalty = torch.add(inverse, tau.log(), alpha=dim / 2)
            positive = penalty.gather(-1, index)
            rest = penalty.sum(-1, keepdim=True) - positive
            rest = rest if out is None else rest - penalty.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            terms = terms + beta * (positive - rest / count)
        ctx.save_for_backward(s, inverse, p.div_(total), index, out)
        ctx.beta, ctx.dim, ctx.count = beta, dim, count
        return terms.mean(1).sum()

    @staticmethod
    @first_order("the gradient of the losses over pairs")
    def backward(ctx: Any, saved: Any, *outer: Tensor) -> Any:
        s, inverse, p, index, out = saved
        # With respect to s / tau: softmax less the positive.
        g = p.scatter_add(-1, index, p.new_full((1,), -1.0).expand(index.shape)).mul_(outer[0] / s.shape[1])
        g_s = g.mul_(inverse)
        g_tau = (g_s * s).mul_(inverse).neg_()
        if ctx.beta:
            # The penalty's derivative is d/(2 tau) - 1/tau²; the mean over negatives counts with a minus.
            slope = (ctx.dim / 2 - inverse).mul_(inverse)
            weight = outer[0] * ctx.beta / (s.shape[1] * ctx.count)
            positive = slope.gather(-1, index) * (ctx.count + 1)
            if out is not None:
                slope.diagonal(dim1=-2, dim2=-1).zero_()
            g_tau.sub_(slope.mul_(weight)).scatter_add_(-1, index, positive * weight)
        return g_s, g_tau, None, None, None, None


class AMCLSimSiamLoss(nn.Module):
    """The loss of SimSiam with a temperature for every positive pair and head:

    $$-\\frac{\\mathrm{sim}(p_1, z_2)}{2\\tau} - \\frac{\\mathrm{sim}(p_2, z_1)}{2\\tilde\\tau} + \\beta\\Omega(\\tau)
      + \\beta\\Omega(\\tilde\\tau),$$

    a sum over heads, a mean over examples; the projections $z$ get no gradient.

    Args:
        temperature: module such as `PairTemperature`.
        beta: weight $\\beta$ of the penalty.

    Shapes:
        Predictions and projections of both views, four times `[C, N, d]`, to a scalar.

    Reference:
        Wang et al., ECCV 2024, loss 2.2.
    """

    def __init__(self, temperature: nn.Module, beta: float = 1e-3) -> None:
        super().__init__()
        self.temperature: Any = _module(temperature)
        self.beta = at_least("beta", beta, 0)
        self.stats: dict[str, Tensor] = {}

    def forward(self, predicted: tuple[Tensor, Tensor], projected: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(predicted[0].device.type, enabled=False):
            p1, p2, z1, z2 = (F.normalize(z, dim=-1) for z in _projections(*predicted, *projected))
            p, z = torch.cat([p1, p2], 1), torch.cat([z2, z1], 1).detach()
            s, tau = (p * z).sum(-1), self.temperature.paired(p, z)
            self.stats = {"positive_temperature": tau.detach().mean(), "positive_similarity": s.detach().mean()}
            terms = self.beta * temperature_penalty(tau, p.shape[-1]) - s / (2 * tau)
            return 2 * terms.mean(1).sum()  # both views of an example are added


class AMCLBarlowLoss(nn.Module):
    """The loss of Barlow Twins with a temperature for every pair of features and head:

    $$\\sum_l (1 - C_{ll}/\\tau_{ll})^2 + \\lambda \\sum_{l \\neq m} C_{lm}^2/\\tau_{lm} + \\beta\\sum_l \\Omega(\\tau_{ll})
      - \\beta\\sum_{l \\neq m}\\Omega(\\tau_{lm}),$$

    a sum over heads, with $C$ the cross-correlation of the views over the batch. Temperatures are those of pairs of
    features, seen as unit vectors over the batch: `temperature` is made for the batch size, which must not change.

    Args:
        temperature: module such as `PairTemperature(batch_size)`; its range should hold 1.
        beta: weight $\\beta$ of the penalty.
        offdiagonal: weight $\\lambda$.

    Shapes:
        Two views `[C, N, d]` to a scalar.

    Reference:
        Wang et al., ECCV 2024, loss 2.3; on what temperatures are computed is this library's reading.
    """

    def __init__(self, temperature: nn.Module, beta: float = 1e-3, offdiagonal: float = 5e-3) -> None:
        super().__init__()
        self.temperature: Any = _module(temperature)
        self.beta = at_least("beta", beta, 0)
        self.offdiagonal = at_least("offdiagonal", offdiagonal, 0)
        self.stats: dict[str, Tensor] = {}

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            a, b = (_columns(z) for z in _projections(first, second))
            correlation, tau, dim = a @ b.mT, self.temperature(a, b), a.shape[1]
            own = correlation.diagonal(dim1=1, dim2=2), tau.diagonal(dim1=1, dim2=2)
            self.stats = {"positive_temperature": own[1].detach().mean(), "positive_similarity": own[0].detach().mean()}
            apart = self.offdiagonal * correlation.square() / tau - self.beta * temperature_penalty(tau, dim)
            terms = (1 - own[0] / own[1]).square() + self.beta * temperature_penalty(own[1], dim)
            return terms.sum() + apart.sum() - apart.diagonal(dim1=1, dim2=2).sum()


def _columns(z: Tensor) -> Tensor:
    """Features `[C, d, N]` as unit vectors over the batch, centred, with the field's guard against none that varies."""
    centred = z - z.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()).mT / z.shape[1] ** 0.5
