"""Merging checkpoints of one pretrained network: task vectors, and the ordinary ways to add them up.

A task vector is what finetuning changed, $\\tau_i = \\theta_i - \\theta_0$. Every method here returns

$$\\theta(\\lambda, M) = \\theta_0 + \\sum_i \\lambda_i\\,(\\tau_i \\odot M),$$

and differs in how it finds the coefficients $\\lambda$ (one per task, or one per task and tensor) and the mask $M$.

References: G. Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, https://arxiv.org/abs/2212.04089;
E. Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
https://arxiv.org/abs/2310.02575.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

__all__ = ["AdaMerging", "MergeResult", "TaskVectors", "average", "entropy", "merge", "task_arithmetic", "task_vectors"]

State = Mapping[str, Tensor]
Checkpoint = nn.Module | State
Weights = float | Sequence[float] | Tensor
Buffers = Literal["pretrained", "average"]
ModelFn = Callable[[Tensor], Tensor]
Forward = Callable[[ModelFn, Tensor, int], Tensor]
Inputs = Tensor | Dataset | Iterable[Any]


def task_vectors(pretrained: Checkpoint, finetuned: Sequence[Checkpoint]) -> list[dict[str, Tensor]]:
    """Task vectors $\\tau_i = \\theta_i - \\theta_0$, one dictionary per checkpoint.

    Args:
        pretrained: the common starting point. Of a module, only parameters that require a gradient count; of a
            state dict, every floating-point entry.
        finetuned: its finetuned checkpoints, at least one.

    Raises:
        ValueError: if a checkpoint lacks or adds entries, or shapes differ (all named), or nothing can be merged.
    """
    base = _weights_of(pretrained)
    vectors = []
    for i, checkpoint in enumerate(finetuned):
        state = _state(checkpoint)
        _check_same(base, _state(pretrained), state, i)
        vectors.append({name: state[name].detach().to(value) - value.detach() for name, value in base.items()})
    return vectors


def merge(
    base: Checkpoint, vectors: Sequence[State], weights: Weights = 0.3, mask: State | None = None
) -> dict[str, Tensor]:
    """The state dict $\\theta_0 + \\sum_i \\lambda_i (\\tau_i \\odot M)$; what no task vector holds stays as in `base`.

    Args:
        base: $\\theta_0$.
        vectors: task vectors of `task_vectors`.
        weights: $\\lambda$: one number, one per task `[T]`, or one per task and tensor `[T, n_tensors]`, the tensors
            in the order of the task vectors.
        mask: $M$, by name; `None` is 1.

    Raises:
        ValueError: if `weights` has another shape, or a mask is missing.
    """
    if not vectors:
        raise ValueError("expected at least one task vector, got none")
    state = {name: value.detach().clone() for name, value in _state(base).items()}
    coefficients = _coefficients(weights, len(vectors), len(vectors[0]))
    missing = [name for name in vectors[0] if mask is not None and name not in mask]
    if missing:
        raise ValueError(f"the mask has no entry for {', '.join(missing[:3])}")
    for j, name in enumerate(vectors[0]):
        stacked = torch.stack([vector[name] for vector in vectors])
        column = coefficients[:, j if coefficients.shape[1] > 1 else 0].to(stacked)
        change = torch.einsum("t,t...->...", column, stacked)
        state[name] = state[name] + (change if mask is None else change * mask[name])
    return state


def _coefficients(weights: Weights, tasks: int, tensors: int) -> Tensor:
    """Coefficients `[T, 1]` or `[T, n_tensors]`."""
    given = torch.as_tensor(weights, dtype=torch.float32)
    if given.dim() == 0:
        given = given.expand(tasks)
    if given.dim() == 1:
        given = given[:, None]
    if tuple(given.shape) not in ((tasks, 1), (tasks, tensors)):
        raise ValueError(f"expected weights of shape [], [{tasks}] or [{tasks}, {tensors}], got {list(given.shape)}")
    if not torch.isfinite(given).all():
        raise ValueError("expected finite weights, got NaN or infinity")
    return given


def average(finetuned: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The plain mean of checkpoints, buffers of floating point included. Needs no pretrained network."""
    if len(finetuned) < 2:
        raise ValueError(f"expected at least 2 checkpoints, got {len(finetuned)}")
    first = _state(finetuned[0])
    states = [_state(checkpoint) for checkpoint in finetuned]
    for i, state in enumerate(states[1:], 1):
        _check_same(first, first, state, i)
    return {
        name: torch.stack([s[name].detach().to(value) for s in states]).mean(0)
        if value.is_floating_point()
        else value.detach().clone()
        for name, value in first.items()
    }


def task_arithmetic(
    pretrained: Checkpoint, finetuned: Sequence[Checkpoint], weight: Weights = 0.3
) -> dict[str, Tensor]:
    """Task arithmetic: all task vectors added with fixed coefficients, 0.3 each unless given."""
    return merge(pretrained, task_vectors(pretrained, finetuned), weight)


def entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy, in nats, of the softmax of logits `[N, classes]`."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


class TaskVectors:
    """A pretrained network and its task vectors in flat buffers, for methods that merge again at every step.

    Attributes:
        names: of the merged tensors, in order.
        base: $\\theta_0$, `[P]`.
        vectors: $\\tau$, `[T, P]`.

    Args:
        pretrained: the network; frozen parameters are not merged.
        finetuned: at least two checkpoints of it.
        heads: modules on top of the merged network, one per task or one for all; `None` takes its outputs as logits.
        forward: `(model_fn, x, task) -> logits`, for networks that take more than that.
        buffers: where differing buffers (BatchNorm's statistics) come from.
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
        self.model = copy.deepcopy(pretrained).eval().requires_grad_(False)
        self._set_buffers([_state(c) for c in finetuned], buffers)
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
        warnings.warn(
            f"{len(differing)} buffers differ between the checkpoints ({', '.join(differing[:3])}); the merged network "
            f"takes {'those of the pretrained one' if buffers == 'pretrained' else 'their average'}",
            stacklevel=4,
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
        parameters = self.unflatten(theta)

        def model_fn(x: Tensor) -> Tensor:
            return functional_call(self.model, parameters, (x,))

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
        return model.requires_grad_(True)


@dataclass(frozen=True)
class MergeResult:
    """A merged network and how it came about.

    Attributes:
        model: an ordinary module, in evaluation mode.
        weights: the coefficients $\\lambda$, `[T, 1]` or `[T, n_tensors]`.
        masks: the mask $M$ by name; empty where there is none.
        perturbations: the universal perturbation of every task; empty where there is none.
        history: a row of scalars per step.
    """

    model: nn.Module
    weights: Tensor
    masks: dict[str, Tensor] = field(default_factory=dict)
    perturbations: tuple[Tensor, ...] = ()
    history: tuple[dict[str, float], ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """The history as a table."""
        return pd.DataFrame(self.history)


class AdaMerging:
    """Task arithmetic whose coefficients are learned on unlabelled inputs, by least entropy.

    $$\\min_\\lambda \\sum_i H\\bigl(f_i(x_i; \\theta_0 + \\sum_j \\lambda_j \\tau_j)\\bigr)$$

    Args:
        weight: the coefficients' start $\\lambda^0$.
        layerwise: one coefficient per task and tensor rather than per task.
        lr: of Adam.
        steps: number of batches.
        batch_size: of inputs given as tensors or data sets; loaders keep their own.
        seed: of the order of inputs.

    Example:
        >>> result = AdaMerging(steps=200).fit(pretrained, [net_a, net_b], [images_a, images_b])
        >>> result.model(x)
    """

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
        self.weight, self.layerwise, self.lr, self.steps = weight, layerwise, lr, steps
        self.batch_size, self.seed = batch_size, seed
        if steps < 0:
            raise ValueError(f"expected steps >= 0, got {steps}")

    def fit(
        self,
        pretrained: nn.Module,
        finetuned: Sequence[Checkpoint],
        batches: Sequence[Inputs],
        *,
        heads: nn.Module | Sequence[nn.Module] | None = None,
        forward: Forward | None = None,
        buffers: Buffers = "pretrained",
    ) -> MergeResult:
        """Merge. Arguments as `torchfolio.adaptation.dam.DefenseAwareMerging.fit`."""
        tasks = TaskVectors(pretrained, finetuned, heads=heads, forward=forward, buffers=buffers)
        stream = Stream(batches, len(tasks), self.batch_size, self.seed, tasks.base.device)
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
        batch_size: of tensors and data sets.
        seed: of their order.
        device: where batches go.
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
        return [next(stream).to(self._device) for stream in self._streams]


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


def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(checkpoint.state_dict() if isinstance(checkpoint, nn.Module) else checkpoint)


def _weights_of(checkpoint: Checkpoint) -> State:
    """What is merged: trainable floating-point parameters, or all floating-point entries of a state dict."""
    named = checkpoint.named_parameters() if isinstance(checkpoint, nn.Module) else checkpoint.items()
    trainable = isinstance(checkpoint, nn.Module)
    found = {n: v for n, v in named if v.is_floating_point() and (v.requires_grad or not trainable)}
    if not found:
        raise ValueError("there is nothing to merge: no trainable floating-point parameter")
    return found


def _check_same(wanted: State, whole: State, state: State, index: int) -> None:
    missing = [name for name in wanted if name not in state]
    strange = [name for name in state if name not in whole]
    if missing or strange:
        parts = [f"lacks {', '.join(missing[:3])}"] * bool(missing) + [f"adds {', '.join(strange[:3])}"] * bool(strange)
        raise ValueError(f"checkpoint {index} is not of the same network: it {' and '.join(parts)}")
    shapes = [n for n, v in wanted.items() if v.shape != state[n].shape]
    if shapes:
        name = shapes[0]
        raise ValueError(
            f"checkpoint {index} has {name} of shape {list(state[name].shape)}, expected {list(wanted[name].shape)}"
        )
    broken = [n for n, v in wanted.items() if v.is_floating_point() and not torch.isfinite(state[n]).all()]
    if broken:
        raise ValueError(f"checkpoint {index} holds NaN or infinity in {broken[0]}")


def _heads(heads: nn.Module | Sequence[nn.Module] | None, tasks: int) -> list[nn.Module]:
    """A head per task, frozen copies in evaluation mode."""
    if heads is None:
        return [nn.Identity()] * tasks
    many = [heads] * tasks if isinstance(heads, nn.Module) and not isinstance(heads, nn.ModuleList) else list(heads)  # type: ignore[arg-type]
    if len(many) != tasks:
        raise ValueError(f"expected one head or {tasks}, got {len(many)}")
    return [copy.deepcopy(head).eval().requires_grad_(False) for head in many]
