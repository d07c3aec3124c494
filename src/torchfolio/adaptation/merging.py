"""Merging checkpoints of one pretrained network with coefficients that are learned from unlabelled inputs.

What is learned here and in methods that build on it is added up by

$$\\theta(\\lambda, M) = \\theta_0 + \\sum_i \\lambda_i\\,(\\tau_i \\odot M),$$

with task vectors $\\tau_i = \\theta_i - \\theta_0$, coefficients $\\lambda$ (one per task, or one per task and tensor) and a mask
$M$; see `torchfolio.adaptation.weights`.

Reference: E. Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
https://arxiv.org/abs/2310.02575.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchfolio.adaptation.merge import Buffers, Forward, Inputs, Merge, MergeResult, Merging
from torchfolio.adaptation.weights import (
    Checkpoint,
    State,
    average,
    merge,
    state_of,
    task_arithmetic,
    task_vectors,
)
from torchfolio.checks import finite, number, positive, whole
from torchfolio.shown import Shown

__all__ = ["AdaMerging", "MergeResult", "TaskVectors", "average", "entropy", "merge", "task_arithmetic", "task_vectors"]


def entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy, in nats, of the softmax of logits `[N, classes]`.

    Raises:
        ValueError: if there is one class alone, whose entropy is always 0.
    """
    if logits.dim() < 2 or logits.shape[-1] < 2:
        raise ValueError(f"expected logits of two classes or more, got outputs of shape {tuple(logits.shape)}")
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


class TaskVectors(Shown):
    """A pretrained network and its task vectors in flat buffers, for methods that merge again at every step.

    Attributes:
        names: names of the merged tensors, in order.
        base: $\\theta_0$, `[P]`.
        vectors: $\\tau$, `[T, P]`.

    Args:
        pretrained: network; frozen parameters are not merged.
        finetuned: two or more checkpoints of it.
        heads: modules on top of the merged network, one per task or one for all; `None` takes its outputs as logits.
        forward: `(model_fn, x, task) -> logits`, for networks that take more than that.
        buffers: source of differing buffers (BatchNorm's statistics).
    """

    def __init__(
        self,
        pretrained: nn.Module,
        finetuned: Sequence[Checkpoint],
        *,
        heads: nn.Module | Sequence[nn.Module] | None = None,
        forward: Forward | None = None,
        buffers: Buffers = "pretrained",
    ) -> None:
        if len(finetuned) < 2:
            raise ValueError(f"expected at least 2 finetuned checkpoints, got {len(finetuned)}")
        if forward is not None and heads is not None:
            raise ValueError("expected heads or forward, got both")
        by_name = task_vectors(pretrained, finetuned)
        self.names = list(by_name[0])
        complex_ones = [name for name, value in by_name[0].items() if value.is_complex()]
        if complex_ones:
            raise ValueError(
                f"coefficients and masks are learned on real weights, and {complex_ones[0]} is complex; task_arithmetic and "
                "average merge it"
            )
        self._places = _places(pretrained, self.names)
        self._flags = {name: p.requires_grad for name, p in pretrained.named_parameters()}
        self.model = copy.deepcopy(pretrained).eval().requires_grad_(False)
        self._set_buffers([state_of(c) for c in finetuned], buffers)
        state = dict(self.model.named_parameters())
        self.shapes = [state[name].shape for name in self.names]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.base = torch.cat([state[name].detach().flatten() for name in self.names])
        self.vectors = torch.stack([torch.cat([v[name].flatten() for name in self.names]) for v in by_name])
        self.heads = _heads(heads, len(finetuned))
        self.forward = forward

    def __len__(self) -> int:
        return len(self.vectors)

    def _set_buffers(self, states: list[State], buffers: Buffers) -> None:
        if buffers not in ("pretrained", "average"):
            raise ValueError(f"expected buffers to be 'pretrained' or 'average', got {buffers!r}")
        own = {n: b for n, b in self.model.named_buffers() if b.is_floating_point() and n in states[0]}
        differing = [n for n, b in own.items() if any(not torch.equal(b, s[n].to(b)) for s in states)]
        if not differing:
            return
        for name in differing:
            for i, state in enumerate(states):
                if not bool(state[name].isfinite().all()):
                    raise ValueError(f"checkpoint {i} holds NaN or infinity in {name}")
        warnings.warn(
            f"{len(differing)} buffers differ between the checkpoints ({', '.join(differing[:3])}); the merged network "
            f"takes {'those of the pretrained one' if buffers == 'pretrained' else 'their average'}",
            stacklevel=5,
        )
        if buffers == "average":
            for name in differing:
                own[name].copy_(torch.stack([s[name].to(own[name]) for s in states]).mean(0))

    def direction(self, weights: Tensor) -> Tensor:
        """$\\sum_i \\lambda_i \\tau_i$ `[P]` for coefficients `[T, 1]` or `[T, n_tensors]`."""
        if weights.shape[1] == 1:
            return weights[:, 0] @ self.vectors
        sizes = torch.tensor(self.sizes, device=weights.device)
        return (weights.repeat_interleave(sizes, 1, output_size=len(self.base)) * self.vectors).sum(0)

    def theta(self, weights: Tensor, mask: Tensor | None = None) -> Tensor:
        """Merged weights `[P]`, differentiable in coefficients and mask."""
        change = self.direction(weights)
        return self.base + (change if mask is None else change * mask)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Named tensors, views of a flat buffer `[P]`."""
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def logits(self, theta: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Logits of every task, of the network with weights `theta`; one pass where the inputs' shapes allow it."""
        named = self.unflatten(theta)
        parameters = {place: named[first] for place, first in self._places.items()}

        def model_fn(x: Tensor) -> Tensor:
            return functional_call(self.model, parameters, (x,), tie_weights=False)

        if self.forward is not None:
            return [self.forward(model_fn, x, i) for i, x in enumerate(inputs)]
        if len({x.shape[1:] for x in inputs}) == 1:
            features = model_fn(torch.cat(list(inputs))).split([len(x) for x in inputs])
        else:
            features = [model_fn(x) for x in inputs]
        return [head(f) for head, f in zip(self.heads, features, strict=True)]

    def merged(self, weights: Tensor, mask: Tensor | None) -> nn.Module:
        """An ordinary module with the merged weights."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            named = dict(model.named_parameters())
            for name, value in self.unflatten(self.theta(weights, mask)).items():
                named[name].copy_(value)
        for name, p in model.named_parameters():
            p.requires_grad_(self._flags[name])
        return model


class AdaMerging(Merge):
    """Task arithmetic whose coefficients are learned on unlabelled inputs, by least entropy.

    $$\\min_\\lambda \\sum_i H\\bigl(f_i(x_i; \\theta_0 + \\sum_j \\lambda_j \\tau_j)\\bigr)$$

    Args:
        weight: the coefficients' start $\\lambda^0$.
        layerwise: one coefficient per task and tensor rather than per task.
        lr: learning rate of Adam.
        steps: number of batches.
        batch_size: batch size of inputs given as tensors or data sets; loaders keep their own.
        seed: seed of the order of inputs.

    Example:
        >>> result = AdaMerging(steps=200).fit(pretrained, [net_a, net_b], [images_a, images_b])
        >>> result.model(x)
    """

    needs_inputs = True

    def __init__(
        self,
        *,
        weight: float = 0.3,
        layerwise: bool = False,
        lr: float = 1e-3,
        steps: int = 1000,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.weight, self.layerwise = finite("weight", number("weight", weight)), layerwise
        self.lr, self.steps = positive("lr", lr), whole("steps", steps, 0)
        self.batch_size, self.seed = whole("batch_size", batch_size, 1), whole("seed", seed)

    def _merge(self, run: Merging) -> MergeResult:
        tasks = TaskVectors(run.pretrained, run.finetuned, heads=run.heads, forward=run.forward, buffers=run.buffers)
        stream = Stream(run.batches, len(tasks), self.batch_size, self.seed, tasks.base.device)
        start = initial_weights(tasks, self.weight, self.layerwise)
        weights, history = adapt_weights(tasks, stream, start, None, lr=self.lr, steps=self.steps)
        return MergeResult(tasks.merged(weights, None), weights, history=tuple(history))


def initial_weights(tasks: TaskVectors, weight: float, layerwise: bool) -> Tensor:
    """Coefficients that are all `weight`: `[T, n_tensors]` if layerwise, else `[T, 1]`."""
    return torch.full((len(tasks), len(tasks.names) if layerwise else 1), weight).to(tasks.base)


def adapt_weights(
    tasks: TaskVectors, stream: Stream, start: Tensor, mask: Tensor | None, *, lr: float, steps: int
) -> tuple[Tensor, list[dict[str, float]]]:
    """Coefficients of least entropy for a fixed mask, from `start`, by Adam."""
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=lr)
    history = []
    for step in range(steps):
        loss = sum_of(entropy(logits) for logits in tasks.logits(tasks.theta(weights, mask), stream.draw()))
        check_finite(loss, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({"phase": 1.0, "step": float(step), "entropy": float(loss.detach())})
    return weights.detach(), history


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Sum of scalar tensors."""
    return torch.stack(list(terms)).sum()


def check_finite(loss: Tensor, step: int) -> None:
    """Stop where a loss is no number."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {float(loss.detach())} at step {step}; lower the learning rates")


class Stream:
    """Endless unlabelled batches, one per task at a time.

    Args:
        batches: per task a tensor of inputs, a data set, or a loader; labels beside the inputs are ignored.
        tasks: number of tasks.
        batch_size: batch size of tensors and data sets.
        seed: seed of their order.
        device: device of the batches.
    """

    def __init__(self, batches: Sequence[Inputs], tasks: int, batch_size: int, seed: int, device: torch.device) -> None:
        if isinstance(batches, Tensor) or len(batches) != tasks:
            got = "one tensor" if isinstance(batches, Tensor) else f"{len(batches)}"
            raise ValueError(f"expected unlabelled inputs for each of the {tasks} checkpoints, got {got}")
        generator = torch.Generator().manual_seed(seed)
        self._streams = [_endless(source, batch_size, generator, i) for i, source in enumerate(batches)]
        self._device = device

    def draw(self) -> list[Tensor]:
        """The next batch of every task."""
        batches = [next(stream).to(self._device) for stream in self._streams]
        for task, x in enumerate(batches):
            # One pass over the batch: NaN and infinity survive a sum.
            if x.is_floating_point() and not bool(x.sum(dtype=torch.float64).isfinite()):
                raise ValueError(f"a batch of task {task} holds NaN or infinity")
        return batches


def _endless(source: Inputs, batch_size: int, generator: torch.Generator, task: int) -> Iterator[Tensor]:
    if isinstance(source, TensorDataset):
        source = source.tensors[0]
    if isinstance(source, Tensor):
        if not len(source) or not torch.isfinite(source).all():
            raise ValueError(f"expected finite inputs for task {task}, got {'none' if not len(source) else 'NaN'}")
        return _shuffled(source, batch_size, generator)
    if isinstance(source, Dataset):
        source = DataLoader(source, batch_size, shuffle=hasattr(source, "__len__"), generator=generator)
    return _repeated(source, task)


def _shuffled(x: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    size = min(batch_size, len(x))
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - size + 1, size):
            yield x[order[start : start + size].to(x.device)]


def _repeated(loader: Iterable[Any], task: int) -> Iterator[Tensor]:
    while True:
        empty = True
        for batch in loader:
            x = batch[0] if isinstance(batch, Sequence) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"expected batches of tensors for task {task}, got {type(x).__name__}")
            empty = False
            yield x
        if empty:
            raise ValueError(f"the loader of task {task} gives no batch (an iterator can be used only once)")


def _places(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Where each of the named tensors stands in a network: one name of every attribute, and its tensor's name.

    `functional_call` ties weights by itself, but leaves a module that is registered twice with what it put there.
    """
    firsts = {id(dict(model.named_parameters(remove_duplicate=False))[name]): name for name in names}
    places: dict[tuple[int, str], tuple[str, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(p) in firsts:
                name = f"{path}.{attribute}" if path else attribute
                places.setdefault((id(module), attribute), (name, firsts[id(p)]))
    return dict(places.values())


def _heads(heads: nn.Module | Sequence[nn.Module] | None, tasks: int) -> list[nn.Module]:
    """A head per task, frozen copies in evaluation mode."""
    if heads is None:
        return [nn.Identity()] * tasks
    many = [heads] * tasks if isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList) else list(heads)  # type: ignore[arg-type]
    if len(many) != tasks:
        raise ValueError(f"expected one head or {tasks}, got {len(many)}")
    return [copy.deepcopy(head).eval().requires_grad_(False) for head in many]
