"""The optimizer of SaRA: AdamW on the entries of a network that are almost zero.

Longer than most because the optimizer owns packing, state on disk and the guard of what must not change.

Reference:
    Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR 2025,
    arXiv 2409.06633.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchfolio.adaptation.packed_entries import PackedEntries, bits_outside, check_parameters, write_entries
from torchfolio.adaptation.small_weights import Named, named_parameters, threshold_for
from torchfolio.checks import at_least, between, positive, whole

__all__ = ["SaRA", "nuclear_gradient"]

SMALLEST_SIDE, FEWEST = 64, 100
"""The rank term is for matrices with longer sides and more trained entries."""


def nuclear_gradient(matrix: Tensor) -> Tensor:
    """Subgradient $U_r V_r^\\top$ of the nuclear norm, over singular values above $10^{-7} \\sigma_\\max$."""
    u, s, vh = torch.linalg.svd(
        matrix.float() if matrix.dtype in (torch.half, torch.bfloat16) else matrix, full_matrices=False
    )
    return ((u * (s > 1e-7 * s[0])) @ vh).to(matrix.dtype)


class SaRA(Optimizer):
    """AdamW on the entries of a network that are almost zero.

    With $g$ the packed gradient, $v \\leftarrow (1 - \\eta w) v - \\eta\\, \\hat m / (\\sqrt{\\hat s} + \\epsilon)$, where
    $\\hat m, \\hat s$ are the usual moments. `zero_grad`, `step`, learning-rate schedules and accumulation of gradients work
    as usual; gradients are clipped by `clip_grad_norm_` of this object, since parameters hold none.

    Args:
        model: network, or its named parameters. Parameters without trained entries stop requiring gradients.
        threshold: $\\theta$; magnitudes below it are trained.
        fraction: share of all entries that is trained, in place of the threshold.
        lr: learning rate; $10^{-3} e^{-350 \\theta}$ by default, which was found for Stable Diffusion.
        betas: decay of the two moments.
        eps: term that keeps the denominator from 0.
        weight_decay: decoupled decay $w$ of the trained entries.
        rank_weight: $\\lambda$ of the nuclear norm; 0 is none.
        rank_every: number of steps from one use of it to the next, since a singular value decomposition costs more than
            a step.
        rank_convs: whether kernels of convolutions count as matrices [out, rest] too.
        progressive_at: step after which entries that have reached the threshold are frozen; never by default.
        seed: seed of the choice of matrices.

    Attributes:
        threshold: $\\theta$.
        zero_share: share of the trained entries that were exactly 0, as of layers that begin at 0.

    Raises:
        ValueError: if not exactly one of threshold and fraction is given, no entry is below the threshold, parameters
            are no real floating-point numbers, or another optimizer has its hooks on them.
        RuntimeError: in a group of several processes, whose gradients are averaged after they are packed.

    Note:
        Weights are already in place after training: there is nothing to merge. `torch.nn.utils.clip_grad_norm_` and
        gradient scalers see no gradients.

    Example:
        >>> net = nn.Linear(8, 8)
        >>> optimizer = SaRA(net, fraction=0.25, lr=1e-2)
        >>> net(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.trainable_count
        18

    Reference:
        Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR
        2025, arXiv 2409.06633, Section 3.
    """

    def __init__(
        self,
        model: Named,
        *,
        threshold: float | None = None,
        fraction: float | None = None,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rank_weight: float = 0.0,
        rank_every: int = 1,
        rank_convs: bool = False,
        progressive_at: int | None = None,
        seed: int = 0,
    ) -> None:
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and torch.distributed.get_world_size() > 1
        ):
            raise RuntimeError("SaRA packs gradients before processes have averaged them: use a single process")
        named = named_parameters(model)
        check_parameters(named)
        if (threshold is None) == (fraction is None):
            raise ValueError("expected exactly one of threshold and fraction")
        self.threshold = threshold_for(named, fraction) if fraction is not None else float(threshold or 0.0)
        positive("threshold", self.threshold)
        for name, value in {"eps": eps, "weight_decay": weight_decay, "rank_weight": rank_weight}.items():
            at_least(name, value, 0)
        for value in betas:
            between("betas", value, 0, 1, inclusive=(True, False))
        lr = 1e-3 * math.exp(-350 * self.threshold) if lr is None else at_least("lr", lr, 0)
        whole("rank_every", rank_every, 1)
        whole("progressive_at", progressive_at, 1) if progressive_at is not None else None
        self.rank_weight, self.rank_every, self.rank_convs = rank_weight, rank_every, rank_convs
        self.progressive_at, self.steps = progressive_at, 0
        self._draws = torch.Generator().manual_seed(seed)
        self._choose(named)
        super().__init__(
            [e.param for e in self._entries], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._hook()

    # What is trained

    def _mask(self, name: str, param: Tensor) -> Tensor:
        """Which entries are trained."""
        return param.detach().abs() < self.threshold

    def _choose(self, named: list[tuple[str, nn.Parameter]]) -> None:
        self._was_trained = {name: p.requires_grad for name, p in named}
        self._all = dict(named)
        chosen, zeros = [], 0
        for name, p in named:
            if not p.requires_grad:
                continue
            index = self._mask(name, p).reshape(-1).nonzero()[:, 0]
            entry = PackedEntries(name, p, index.int() if p.numel() < 2**31 else index)
            if len(index):
                chosen.append(entry)
                zeros += int((entry.values() == 0).sum())
        if not chosen:
            smallest = min((float(p.detach().abs().min()) for _, p in named if p.requires_grad), default=math.nan)
            raise ValueError(f"no entry is below the threshold {self.threshold:g}; the smallest is {smallest:g}")
        for name, p in named:
            p.requires_grad_(any(name == e.name for e in chosen))
        kinds = {(e.param.device, e.param.dtype) for e in chosen}
        if len(kinds) > 1:
            raise ValueError(f"expected parameters of one device and type, got {', '.join(map(str, kinds))}")
        self._entries = chosen
        self._first = {e.name: e.index for e in chosen}
        self.zero_share = zeros / sum(len(e.index) for e in chosen)
        self._sums = {name: bits_outside(self._all[name], self._first.get(name)) for name in self._all}
        self._allocate()

    def _allocate(self) -> None:
        """Packed vectors of the present entries, gradient and moments, in 32 bits or more: moments would not move in 16."""
        start = 0
        for e in self._entries:
            e.part = slice(start, start + len(e.index))
            start += len(e.index)
        like = self._entries[0].param
        self._grad, self._mean, self._square = (
            torch.zeros(start, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
            for _ in range(3)
        )

    def _hook(self) -> None:
        this = weakref.ref(self)  # a network must not keep its optimizer alive

        def pack(entry: PackedEntries) -> Callable[[Tensor], None]:
            def hook(param: Tensor) -> None:
                owner = this()
                if owner is not None and param.grad is not None:
                    owner._grad[entry.part] += param.grad.detach().reshape(-1).index_select(0, entry.index)
                    param.grad = None

            return hook

        for e in self._entries:
            e.handle = e.param.register_post_accumulate_grad_hook(pack(e))

    @property
    def trainable_count(self) -> int:
        """Number of trained entries."""
        return len(self._grad)

    @property
    def state_bytes(self) -> int:
        """Bytes of packed gradients and moments."""
        return 3 * self._grad.numel() * self._grad.element_size()

    def mask(self, name: str) -> Tensor:
        """Which entries of a parameter are trained at present, bool of its shape.

        Raises:
            ValueError: if there is no such parameter.
        """
        if name not in self._all:
            raise ValueError(f"there is no parameter {name!r}; there are {', '.join(list(self._all)[:5])}, …")
        mask = torch.zeros(self._all[name].numel(), dtype=torch.bool, device=self._all[name].device)
        for e in self._entries:
            if e.name == name:
                mask[e.index.long()] = True
        return mask.view(self._all[name].shape)

    def release(self) -> None:
        """Take the hooks off and let parameters require gradients as before; the optimizer is of no use afterwards."""
        for e in self._entries:
            e.handle.remove()
        for name, p in self._all.items():
            p.requires_grad_(self._was_trained[name])

    # Steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._grad.zero_()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale packed gradients down to a norm; returns the norm before."""
        norm = torch.linalg.vector_norm(self._grad)
        self._grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of AdamW on the trained entries; packed gradients are 0 afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.rank_weight and self.steps % self.rank_every == 0:
            self._add_rank_term()
        self.steps += 1
        group = self.param_groups[0]
        lr, (b1, b2) = float(group["lr"]), group["betas"]
        values = torch.cat([e.values() for e in self._entries]).to(self._grad.dtype)
        values.mul_(1 - lr * group["weight_decay"])
        self._mean.lerp_(self._grad, 1 - b1)
        self._square.mul_(b2).addcmul_(self._grad, self._grad, value=1 - b2)
        root = (self._square.sqrt() / math.sqrt(1 - b2**self.steps)).add_(group["eps"])
        values.addcdiv_(self._mean, root, value=-lr / (1 - b1**self.steps))
        for e in self._entries:
            e.write(values)
        self._grad.zero_()
        if self.steps == self.progressive_at:
            self._freeze()
        return loss

    def _add_rank_term(self) -> None:
        """The gradient of the nuclear norm of one matrix, drawn at random."""
        able = [e for e in self._entries if self._matrix_shape(e) is not None]
        if not able:
            return
        e = able[int(torch.randint(len(able), (1,), generator=self._draws))]
        shape = self._matrix_shape(e)
        assert shape is not None
        sparse = e.param.new_zeros(e.param.numel()).index_copy_(0, e.index.long(), e.values())
        gradient_part = nuclear_gradient(sparse.view(shape)).reshape(-1).index_select(0, e.index)
        self._grad[e.part].add_(gradient_part, alpha=self.rank_weight)

    def _matrix_shape(self, e: PackedEntries) -> tuple[int, int] | None:
        p = e.param
        if len(e.index) <= FEWEST or not (p.dim() == 2 or (self.rank_convs and p.dim() > 2)):
            return None
        shape = len(p), p[0].numel()
        return shape if min(shape) > SMALLEST_SIDE else None

    def _freeze(self) -> None:
        """Entries that have reached the threshold are trained no longer; the others keep their moments."""
        keep = torch.cat([e.values() for e in self._entries]).abs() < self.threshold
        mean, square = self._mean[keep], self._square[keep]
        left = []
        for e in self._entries:
            e.index = e.index[keep[e.part]]
            if len(e.index):
                left.append(e)
            else:
                e.handle.remove()
                e.param.requires_grad_(False)
        self._entries = left
        if not left:
            raise ValueError(f"all trained entries have outgrown the threshold {self.threshold:g} at step {self.steps}")
        self._allocate()
        self._mean.copy_(mean)
        self._square.copy_(square)

    # On disk

    def state_dict(self) -> dict[str, Any]:
        """Moments, positions and settings, to go on with after `load_state_dict`."""
        groups = [{**{k: v for k, v in g.items() if k != "params"}, "params": []} for g in self.param_groups]
        state = {
            "step": self.steps, "threshold": self.threshold, "mean": self._mean.clone(), "square": self._square.clone(),
            "index": {e.name: e.index.clone() for e in self._entries}, "draws": self._draws.get_state(),
        }  # fmt: skip
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Go on from `state_dict`. Load the network's weights first.

        Raises:
            ValueError: if it is of other parameters or of another threshold.
        """
        state = state_dict["state"]
        if not set(state["index"]) <= set(self._first) or state["threshold"] != self.threshold:
            raise ValueError("the state is of another network or threshold")
        entries = {e.name: e for e in self._entries}
        for name, e in entries.items():
            if name not in state["index"]:
                e.handle.remove()
                e.param.requires_grad_(False)
        self._entries = [e for name, e in entries.items() if name in state["index"]]
        for e in self._entries:
            e.index = state["index"][e.name].to(e.param.device)
        self._allocate()
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])
        self.steps = state["step"]
        self._draws.set_state(state["draws"].cpu())
        for group, stored in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in stored.items() if k != "params"})

    def delta_state_dict(self) -> dict[str, Tensor]:
        """Present values of all entries that were trained at any time, by parameter: all that fine-tuning changed.

        Raises:
            ValueError: if other entries have changed since, as by `model.load_state_dict`: the mask is no longer theirs.
        """
        for name in self._all:
            if bits_outside(self._all[name], self._first.get(name)) != self._sums[name]:
                raise ValueError(f"entries of {name} that are not trained have changed since the optimizer was built")
        return {
            name: self._all[name].detach().reshape(-1).index_select(0, index) for name, index in self._first.items()
        }

    def load_delta_state_dict(self, delta: Mapping[str, Tensor]) -> None:
        """Write values of `delta_state_dict` into the network.

        Raises:
            ValueError: if they are of another mask.
        """
        write_entries(self._all, self._first, delta)
